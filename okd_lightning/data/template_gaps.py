"""Contents of chats that a chat template leaves out, found by rendering a chat with and without.

Templates of older models know no tools, no system prompt or no thinking, and render such a chat
without an error. Each kind of content is tried once a dataset, in the first chat that has it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

from okd_lightning.data.templates import ChatRenderer, Message
from okd_lightning.errors import DataError

_PROBE = " okd probe"
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")

_Variant = tuple[str, list[Message], list[Any] | None]
"""A kind of content, and a chat's messages and tools without it."""


def _variants(messages: Sequence[Message], tools: list[Any] | None) -> Iterator[_Variant]:
    for number, message in enumerate(messages):
        role = message["role"]
        if role != "assistant" and message["content"].strip():
            place = "" if number == 0 or role != "system" else " after the first one"
            changed = {**message, "content": message["content"] + _PROBE}
            yield f"messages of the role {role!r}{place}", _with(messages, number, changed), tools
        if message.get("tool_calls"):
            yield "tool_calls", _with(messages, number, _less(message, "tool_calls")), tools
        for key in _THOUGHTS if number == len(messages) - 1 else ():  # earlier ones may be dropped
            if isinstance(message.get(key), str) and message[key].strip():
                yield f"{key!r} of messages", _with(messages, number, _less(message, key)), tools
    if tools:
        yield "the tools of rows", list(messages), None


def _with(messages: Sequence[Message], number: int, other: Message) -> list[Message]:
    return [*messages[:number], other, *messages[number + 1 :]]


def _less(message: Message, key: str) -> Message:
    return {name: value for name, value in message.items() if name != key}


def contents_left_out(
    chats: Sequence[tuple[Sequence[Message], list[Any] | None]],
    renderer: ChatRenderer,
    places: Sequence[str],
) -> tuple[str, ...]:
    """Return a message for each kind of content that the template does not show.

    Args:
        chats: Messages and tools of each row.
        renderer: Renders them.
        places: File and row of each.
    """
    tried, notes = set[str](), list[str]()
    for (messages, tools), at in zip(chats, places, strict=True):
        for kind, other, other_tools in _variants(messages, tools):
            if kind in tried:
                continue
            tried.add(kind)
            with suppress(DataError):  # it refuses the chat without it
                whole = renderer.prompt(messages, tools, at)
                if whole == renderer.prompt(other, other_tools, at):
                    notes.append(
                        f"the chat template does not show {kind}, so that the rows teach less than "
                        "they have; set a chat_template that does"
                    )
    return tuple(notes)
