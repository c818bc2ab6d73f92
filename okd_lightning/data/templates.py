"""Chats as text: rendered by the tokenizer's template, divided at assistant turns.

The start and end of a turn are found by rendering prefixes of the chat: the rendering of the first
k messages must be a prefix of the whole rendering. With templates that render the last answer
differently (thinking that is only shown there, an end that is written once) this holds for some
turns only; the other turns are unplaced. Nothing here knows token ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from okd_lightning.data.columns import require_whole_characters
from okd_lightning.data.template_process import TemplateProcess
from okd_lightning.errors import DataError
from okd_lightning.records.images import MARKER

Message = dict[str, Any]

_TRIAL = "trial"


@dataclass(frozen=True)
class Turn:
    """An assistant turn in a rendered chat.

    Attributes:
        text: Its text in the rendering, from the end of its generation prompt on, with the
            template's end of the turn.
        after: Text up to the next requested turn, or to the end.
        content: The message's own text.
    """

    text: str
    after: str
    content: str


@dataclass(frozen=True)
class RenderedChat:
    """A chat as text: the opening, then each turn with what follows it.

    Attributes:
        opening: Everything before the first turn.
        turns: The requested turns that were found.
        is_answered: Whether the last turn is the end of the chat; else the text ends with the
            generation prompt.
        unplaced: Numbers (from 0) of requested messages that were not found.
    """

    opening: str
    turns: tuple[Turn, ...]
    is_answered: bool
    unplaced: tuple[int, ...] = ()

    @property
    def prompt(self) -> str:
        """Everything before the response; the whole text if the chat is not answered."""
        turns = self.turns[:-1] if self.is_answered else self.turns
        return self.opening + "".join(turn.text + turn.after for turn in turns)


class ChatRenderer:
    """Renders chats with one tokenizer's template.

    Args:
        tokenizer: Must have a chat template.
        where: The dataset's name for messages.
        settings: Further arguments of the template, such as Qwen3's enable_thinking.
        images: Whether the messages have images, of which ``<image>`` is the place; None for a
            text model. Where they do, and where the template reads no contents that are text,
            contents are lists of parts.

    Raises:
        DataError: The tokenizer has no chat template.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        where: str,
        settings: Mapping[str, Any] | None = None,
        images: bool | None = None,
    ) -> None:
        if not tokenizer.chat_template:
            raise DataError(
                f"{where}: rows are chats, but the tokenizer {tokenizer.name_or_path!r} has no "
                "chat_template; use an instruction-tuned model's tokenizer, set chat_template, "
                "or give prompt and response columns"
            )
        self._settings, self._process = settings or {}, TemplateProcess(tokenizer)
        self._marker = MARKER if images else None
        self._in_parts = images is not None and self._reads_parts(bool(images))

    def _reads_parts(self, are_preferred: bool) -> bool:
        """Return whether contents are given as parts: the template renders these, not text."""
        if not are_preferred and self._renders(_TRIAL):
            return False
        return self._renders([{"type": "text", "text": _TRIAL}])

    def _renders(self, content: Any) -> bool:
        trial = [{"role": "user", "content": content}]
        settings = {"add_generation_prompt": False, **self._settings}
        try:
            (found,) = self._process.render([(trial, settings)], "the chat template")
        except DataError:
            return False
        return _TRIAL in found and f"'{_TRIAL}'" not in found

    def prompt(self, messages: Sequence[Message], tools: list[Any] | None, at: str) -> str:
        """Return the rendering that a response continues, with the generation prompt.

        Raises:
            DataError: The template refuses the chat, or the chat has a lone surrogate.
        """
        return self._render([(messages, True)], tools, at)[0]

    def texts(
        self, chats: Sequence[tuple[Sequence[Message], list[Any] | None]], what: str
    ) -> list[str]:
        """Return the renderings of whole chats with their tools, without a generation prompt.

        Args:
            chats: Messages and tools of each.
            what: Subject of error messages.

        Raises:
            DataError: The template refuses one of them.
        """
        wanted = [
            (messages, {"tools": tools, "add_generation_prompt": False, **self._settings})
            for messages, tools in chats
        ]
        return self._process.render(wanted, what)

    def _render(
        self, chats: Sequence[tuple[Sequence[Message], bool]], tools: list[Any] | None, at: str
    ) -> list[str]:
        """Render prefixes of one chat, each with or without a generation prompt."""
        wanted = [
            (
                in_parts(messages, self._marker) if self._in_parts else messages,
                {"tools": tools, "add_generation_prompt": prompt, **self._settings},
            )
            for messages, prompt in chats
        ]
        try:
            found = self._process.render(wanted, f"{at}: the chat template")
        except DataError as error:
            longest = max((messages for messages, _ in chats), key=len)
            raise DataError(
                f"{error}; roles: {', '.join(str(message['role']) for message in longest)}; fix "
                "or delete the row"
            ) from error
        for rendered in found:
            require_whole_characters(rendered, f"{at}: the chat")
        return found

    def render(
        self, messages: Sequence[Message], tools: list[Any] | None, at: str, turns: Sequence[int]
    ) -> RenderedChat:
        """Render one chat and locate some of its assistant turns.

        Args:
            messages: At least one; the first is not the assistant's.
            tools: Tools that the template may list.
            at: File and row, for messages.
            turns: Messages to locate, as numbers from 0 in ascending order. A chat that ends with
                the assistant is answered only if its last message is among them.

        Raises:
            DataError: The template refuses the chat, or the chat has a lone surrogate.
        """
        is_answered = messages[-1]["role"] == "assistant"
        beginnings = [(messages[: turn + own], not own) for turn in turns for own in (0, 1)]
        full, *parts = self._render([(messages, not is_answered), *beginnings], tools, at)
        places: list[tuple[int, int, str]] = []
        unplaced: list[int] = []
        for turn, before, after in zip(turns, parts[::2], parts[1::2], strict=True):
            if full.startswith(before) and full.startswith(after) and len(before) < len(after):
                places.append((len(before), len(after), messages[turn]["content"]))
            else:
                unplaced.append(turn)
        if not places:
            return RenderedChat(full, (), False, tuple(unplaced))
        nexts = [*(start for start, _, _ in places[1:]), len(full)]
        found = tuple(
            Turn(full[start:end], full[end:following], content)
            for (start, end, content), following in zip(places, nexts, strict=True)
        )
        is_answered = is_answered and places[-1][1] == len(full)
        return RenderedChat(full[: places[0][0]], found, is_answered, tuple(unplaced))


def in_parts(messages: Sequence[Message], marker: str | None) -> list[Message]:
    """Return messages whose contents are lists of parts: texts, and an image for each marker."""
    return [{**message, "content": _parts(message["content"], marker)} for message in messages]


def _parts(text: str, marker: str | None) -> list[dict[str, str]]:
    first, *others = [text] if marker is None else text.split(marker)
    parts = [{"type": "text", "text": first}]
    for other in others:
        parts += [{"type": "image"}, {"type": "text", "text": other}]
    return [part for part in parts if part.get("text") != ""] or parts[:1]


def not_prefix_stable(turn: int, at: str) -> DataError:
    """Return the error for a required turn that was not found.

    Args:
        turn: The message's number, from 0.
        at: File and row.
    """
    return DataError(
        f"{at}: the chat template is not prefix-stable at message {turn + 1} (assistant): it "
        "renders the beginning of a chat differently once more follows, so loss masks would be "
        "wrong; set a chat_template whose generation prompt is how it begins an assistant turn, "
        "or use a method that needs prompts only"
    )
