"""Contents of chats that a chat template leaves out, found by rendering a chat with and without.

Templates of older models know no tools, no system prompt or no thinking, and render such a chat
without an error. Each kind of content is tried once a dataset, in the first chat that has it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from okd_lightning.data.templates import ChatRenderer, Message
from okd_lightning.errors import DataError

_PROBE = " okd probe"
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")

_Variant = tuple[list[Message], list[Any] | None]
"""A chat's messages and tools without some content."""


def _variants(
    messages: Sequence[Message], tools: list[Any] | None
) -> Iterator[tuple[str, Callable[[], _Variant]]]:
    """Yield each kind of content, and a function that makes the chat without it."""
    for number, message in enumerate(messages):
        role = message["role"]
        if role != "assistant" and message["content"].strip():
            place = "" if number == 0 or role != "system" else " after the first one"
            kind = f"messages of the role {role!r}{place}"
            yield kind, partial(_changed, messages, tools, number, "content")
        if message.get("tool_calls"):
            yield "tool_calls", partial(_changed, messages, tools, number, "tool_calls")
        for key in _THOUGHTS if number == len(messages) - 1 else ():  # earlier ones may be dropped
            if isinstance(message.get(key), str) and message[key].strip():
                yield f"{key!r} of messages", partial(_changed, messages, tools, number, key)
    if tools:
        yield "the tools of rows", lambda: (list(messages), None)


def _changed(
    messages: Sequence[Message], tools: list[Any] | None, number: int, key: str
) -> _Variant:
    """Return a chat with another content of a message, or without another key of it."""
    other = {name: value for name, value in messages[number].items() if name != key}
    if key == "content":
        other[key] = messages[number][key] + _PROBE
    return [*messages[:number], other, *messages[number + 1 :]], tools


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
        for kind, without in _variants(messages, tools):
            if kind in tried:
                continue
            tried.add(kind)
            other, other_tools = without()
            with suppress(DataError):  # it refuses the chat without it
                whole = renderer.prompt(messages, tools, at)
                if whole == renderer.prompt(other, other_tools, at):
                    notes.append(
                        f"the chat template does not show {kind}, so that the rows teach less than "
                        "they have; set a chat_template that does"
                    )
    return tuple(notes)
