"""Chats as text: rendered by the tokenizer's template, cut into the assistant's words and the rest.

Where a turn begins and ends is found by rendering prefixes of the chat: what the template writes
for the first k messages must be how the whole rendering begins. A template for which that does not
hold (one that strips earlier thinking, or writes something after the last message only) is refused,
because no mask can be trusted there. Nothing here knows token ids.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from okd_lightning.data.columns import require_whole_characters
from okd_lightning.errors import DataError

Message = dict[str, Any]


@dataclass(frozen=True)
class Span:
    """A stretch of a rendered chat.

    Attributes:
        text: What the template wrote.
        is_assistant: True where the assistant wrote it, its end-of-turn token included.
    """

    text: str
    is_assistant: bool


@dataclass(frozen=True)
class RenderedChat:
    """A chat as text; the spans laid end to end are the rendering, up to the last turn's end.

    Attributes:
        prompt: Everything before the last assistant turn; where the last message is not the
            assistant's, all of it with the generation prompt.
        response: The last assistant turn with its end-of-turn token; empty where the last message
            is not the assistant's.
        end_of_turn: The special token that the template closed the response with; empty for none.
    """

    prompt: tuple[Span, ...]
    response: str
    end_of_turn: str


class ChatRenderer:
    """Renders chats with one tokenizer's template.

    Args:
        tokenizer: Must have a chat template.
        eos_id: The token that ends a response.
        where: The data set's name for messages.
        settings: What the template is told beside the chat, such as Qwen3's enable_thinking.

    Raises:
        DataError: The tokenizer has no chat template.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        eos_id: int,
        where: str,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        if not tokenizer.chat_template:
            raise DataError(
                f"{where}: rows are chats, but the tokenizer {tokenizer.name_or_path!r} has no "
                "chat_template; use an instruction-tuned model's tokenizer, set chat_template, "
                "or give prompt and response columns"
            )
        self._tokenizer, self._settings = tokenizer, settings or {}
        self._eos = str(tokenizer.convert_ids_to_tokens(eos_id))
        added = tokenizer.added_tokens_decoder.values()
        specials = {token.content for token in added if token.special} | {self._eos}
        longest_first = sorted(specials, key=len, reverse=True)
        one_special = "|".join(re.escape(special) for special in longest_first)
        self._special = re.compile(one_special)
        self._closing = re.compile(rf"(?:(?:{one_special})\s*)+\Z")

    def _render(
        self, messages: Sequence[Message], tools: list[Any] | None, at: str, *, prompt: bool
    ) -> str:
        try:
            rendered = self._tokenizer.apply_chat_template(
                list(messages),
                tools=tools,
                tokenize=False,
                add_generation_prompt=prompt,
                **self._settings,
            )
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise DataError(
                f"{at}: the chat template refuses this chat ({error}); roles: "
                f"{', '.join(message['role'] for message in messages)}; mend or delete the row"
            ) from error
        return str(rendered)

    def _split_turn(self, turn: str) -> tuple[str, str]:
        """The assistant's own part of what a turn rendered to, and the special token that ends it.

        A turn closes with special tokens and blanks. It ends at the first eos among them, else at
        the last special one; without any, where its text ends.
        """
        closing = self._closing.search(turn)
        if closing is None:
            return turn.rstrip(), ""
        tokens = list(self._special.finditer(turn, closing.start()))
        end = next((token for token in tokens if token.group() == self._eos), tokens[-1])
        return turn[: end.end()], end.group()

    def render(self, messages: list[Message], tools: list[Any] | None, at: str) -> RenderedChat:
        """Render one chat.

        Args:
            messages: At least one; the first is not the assistant's.
            tools: What the template may list as callable.
            at: File and row, for messages.

        Raises:
            DataError: The template is not prefix-stable on this chat, or refuses it; or the chat
                holds half a character.
        """
        is_answered = messages[-1]["role"] == "assistant"
        full = self._render(messages, tools, at, prompt=not is_answered)
        require_whole_characters(full, f"{at}: the chat")
        spans: list[Span] = []
        done, end_of_turn = 0, ""
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:turn], tools, at, prompt=True)
            after = self._render(messages[: turn + 1], tools, at, prompt=False)
            if not (
                full.startswith(before) and full.startswith(after) and len(before) < len(after)
            ):
                raise DataError(
                    f"{at}: the chat template is not prefix-stable at message {turn + 1} "
                    "(assistant): it renders the beginning of a chat differently once more "
                    "follows, so loss masks would be wrong; set a chat_template that renders "
                    "each message the same wherever it stands, or give single-turn rows"
                )
            own, end_of_turn = self._split_turn(full[len(before) : len(after)])
            spans += [Span(full[done : len(before)], False), Span(own, True)]
            done = len(before) + len(own)
        if is_answered:
            return RenderedChat(tuple(spans[:-1]), spans[-1].text, end_of_turn)
        return RenderedChat((*spans, Span(full[done:], False)), "", "")
