"""Tool results in chats: their rendering by the chat template between two turns.

The template renders the chat with the calls and their results. Its text from the end of the
assistant's turn to the start of the next one is appended to the sampled ids. Sampled ids are never
rendered again. Templates that are not prefix-stable, show no results, or close no turns are refused
before generation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from transformers import PreTrainedTokenizerBase

from okd_lightning.data.chat_ids import TurnIds, encode_turns
from okd_lightning.data.distilled_module import DistilledPair
from okd_lightning.data.templates import ChatRenderer, Message, RenderedChat, not_prefix_stable
from okd_lightning.engines.tool_rollouts import Exchange, ToolRounds
from okd_lightning.errors import ConfigError, DataError
from okd_lightning.models.text_ids import TextEncoder
from okd_lightning.records.requests import Chat
from okd_lightning.tools import Toolbox
from okd_lightning.tools.tool_calls import ToolCall

_MAX_TURNS = 4
_PROBE_RESULT = "what the tool answers"


def checked_turns(max_turns: int | None, toolbox: Toolbox) -> int:
    """Return the most turns of a response.

    Args:
        max_turns: The setting; None for 4.
        toolbox: The tools.

    Raises:
        ConfigError: ``max_turns`` is set without tools.
    """
    if max_turns is not None and not len(toolbox):
        raise ConfigError(
            f"data.max_turns {max_turns} has no effect: responses have several turns where "
            "they call tools; give --data.tools, or leave it out"
        )
    return _MAX_TURNS if max_turns is None else max_turns


def equip(
    pair: DistilledPair,
    toolbox: Toolbox,
    max_turns: int,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Set the tools of a pair's rollouts; an empty toolbox sets none.

    The ids with which the template closes a turn are added to its end ids.

    Raises:
        ConfigError: The tokenizer has no chat template, or one that cannot show tool results; or
            the teacher has another tokenizer.
        DataError: The template is not prefix-stable.
    """
    if not len(toolbox):
        pair.tool_rounds = None
        return
    if pair.teacher.tokenizer is not None:
        raise ConfigError(
            "data.tools: a teacher with another tokenizer would render turns and tool results by "
            "its own template, which is not offered; leave data.tools out, or give a teacher with "
            "the student's tokenizer"
        )
    turns = ToolTurns(pair.tokenizer, eos_id=pair.eos_ids[0], settings=settings)
    pair.add_eos_ids(turns.check(toolbox.schemas))
    pair.tool_rounds = ToolRounds(toolbox, turns, max_turns)


class ToolTurns:
    """A tokenizer and its template as the ``Conversation`` of ``engines.tool_rollouts``.

    Args:
        tokenizer: Must have a chat template.
        eos_id: The token that ends a response.
        settings: Further arguments of the template.

    Raises:
        ConfigError: The tokenizer has no chat template.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        eos_id: int,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        if not tokenizer.chat_template:
            raise ConfigError(
                f"data.tools are called in chats, but the tokenizer {tokenizer.name_or_path!r} has "
                "no chat_template; use an instruction-tuned model's tokenizer, or leave the tools "
                "out"
            )
        self._encoder = TextEncoder(tokenizer)
        self._eos_ids = (eos_id,)
        self._renderer = ChatRenderer(tokenizer, where="data.tools", settings=settings)

    def check(self, schemas: Sequence[dict[str, Any]]) -> list[int]:
        """Test the template on a chat with two exchanges.

        Returns:
            The ids with which it closes turns.

        Raises:
            ConfigError: It shows no results, or closes a turn without a special token.
            DataError: It is not prefix-stable, or refuses such a chat.
        """
        exchange = Exchange((ToolCall(schemas[0]["function"]["name"], {}),), (_PROBE_RESULT,))
        question = {"role": "user", "content": "What?"}
        chat = Chat((question,), tuple(schemas))
        rendered = self._render(chat, [exchange, exchange])
        if _PROBE_RESULT not in rendered.turns[-1].after:
            raise ConfigError(
                "data.tools: the tokenizer's chat template does not show what tools answer "
                "(messages of the role 'tool'); set a chat_template that does"
            )
        call, *_ = _messages(exchange, 0, num_calls=1)
        answer = {"role": "assistant", "content": "That."}
        closed = self._turns(
            [self._rendered([question, turn], list(schemas)) for turn in (call, answer)]
        )
        ends = {turn.end_id for turn in closed}
        if None in ends:
            raise ConfigError(
                "data.tools: the tokenizer's chat template closes a turn with no special token, so "
                "a turn that calls a tool has no end; set a chat_template that writes one"
            )
        listed = self._renderer.prompt([question], list(schemas), "data.tools")
        if schemas[0]["function"]["name"] not in listed:
            rank_zero_warn(
                "the tokenizer's chat template does not list tools: the model learns of data.tools "
                "only what the messages say"
            )
        return sorted(end for end in ends if end is not None)

    def read(self, ids: Sequence[int]) -> str:
        """Return the text of a turn with special tokens, with which some tokenizers mark calls."""
        return str(
            self._encoder.tokenizer.decode(
                list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )

    def continuations(
        self, chats: Sequence[tuple[Chat, Sequence[Exchange]]]
    ) -> list[tuple[int, ...]]:
        """Return the ids after the last turn of each chat, up to the next turn."""
        turns = self._turns([self._render(*pair) for pair in chats])
        return [tuple(turn.after_ids) for turn in turns]

    def _turns(self, chats: Sequence[RenderedChat]) -> list[TurnIds]:
        """Return the ids of each chat's last assistant turn, and of the text after it."""
        contexts, turns = [chat.opening for chat in chats], [chat.turns[-1] for chat in chats]
        return encode_turns(self._encoder, contexts, turns, self._eos_ids)

    def _rendered(self, messages: list[Message], tools: list[Any] | None) -> RenderedChat:
        """Render a chat and locate its last assistant turn."""
        last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
        rendered = self._renderer.render(messages, tools, "data.tools", [last])
        if rendered.unplaced:
            raise not_prefix_stable(last, "data.tools")
        return rendered

    def _render(self, chat: Chat, exchanges: Sequence[Exchange]) -> RenderedChat:
        """Render the chat with all exchanges; with the first call alone if a turn may have one."""
        try:
            return self._render_calls(chat, exchanges, None)
        except DataError:
            if all(len(exchange.calls) == 1 for exchange in exchanges):
                raise
            return self._render_calls(chat, exchanges, 1)

    def _render_calls(
        self, chat: Chat, exchanges: Sequence[Exchange], num_calls: int | None
    ) -> RenderedChat:
        messages: list[Message] = [dict(message) for message in chat.messages]
        num_before = 0
        for exchange in exchanges:
            messages += _messages(exchange, num_before, num_calls)
            num_before += len(exchange.calls)
        tools = None if chat.tools is None else [dict(tool) for tool in chat.tools]
        return self._rendered(messages, tools)


def _messages(exchange: Exchange, num_before: int, num_calls: int | None) -> list[Message]:
    """Return the assistant's turn with ``num_calls`` calls (None: all), and its results."""
    names = [f"call{num_before + i:05}" for i in range(len(exchange.calls))]
    calls = [
        {
            "id": name,
            "type": "function",
            "function": {"name": call.name, "arguments": dict(call.arguments or {})},
        }
        for name, call in zip(names, exchange.calls, strict=True)
    ]
    results = [
        {"role": "tool", "tool_call_id": name, "name": call.name, "content": result}
        for name, call, result in zip(names, exchange.calls, exchange.results, strict=True)
    ]
    return [{"role": "assistant", "content": "", "tool_calls": calls[:num_calls]}, *results]
