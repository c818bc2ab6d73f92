"""The messages of a chat row, and which of its assistant turns carry loss.

Owns message keys besides role and content: arguments of tool calls, which are JSON text in the
OpenAI format, and the keys with which other formats switch off the loss of a turn.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from okd_lightning.bounded_files import json_problem
from okd_lightning.data.columns import Columns, RawRow, read_answer, read_messages
from okd_lightning.data.templates import Message
from okd_lightning.errors import DataError

_LOSS_KEYS = ("weight", "train", "training", "trainable", "loss", "loss_weight", "loss_scale")
"""1 or true: the turn carries loss; 0 or false: it is context."""

_REFUSED_KEYS = ("train_detail", "training_detail", "loss_mask", "mask", "masked", "function_call")
"""Keys about a part of a turn, or in a form that templates do not read."""


@dataclass(frozen=True)
class ChatTurns:
    """A chat that ends with a turn that carries loss, or with one that needs an answer.

    Attributes:
        messages: The messages for the chat template.
        learned: Numbers (from 0) of the assistant messages that carry loss.
    """

    messages: tuple[Message, ...]
    learned: tuple[int, ...]

    @property
    def is_answered(self) -> bool:
        """True if the last message is the response."""
        return self.messages[-1]["role"] == "assistant"

    @property
    def asked(self) -> tuple[Message, ...]:
        """The messages that a response continues."""
        return self.messages[:-1] if self.is_answered else self.messages


def read_turns(row: RawRow, columns: Columns, at: str) -> ChatTurns:
    """Return the chat of a row, completed by the response column if it ends with another role.

    Turns of a prompt carry no loss if a response completes it (TRL's prompt and completion). A
    blank final answer is removed. A final answer whose loss is switched off is removed too, with
    all messages after the last turn that carries loss.

    Raises:
        DataError: The row is not a chat, or a message has an unsupported key.
    """
    messages = read_messages(row, columns, at)
    if _is_blank_answer(messages[-1]):
        messages = messages[:-1]
    if messages[-1]["role"] != "assistant":
        answer = read_answer(row, columns, at)
        if columns.chats_are_prompts and answer:
            messages = [_without_loss(message) for message in messages]
        messages += answer
        messages = messages[:-1] if _is_blank_answer(messages[-1]) else messages
    places = [f"{at}: message {number}" for number in range(1, len(messages) + 1)]
    learned = [
        number
        for number, (message, place) in enumerate(zip(messages, places, strict=True))
        if _carries_loss(message, place)
    ]
    read = [_as_rendered(message, place) for message, place in zip(messages, places, strict=True)]
    while read[-1]["role"] == "assistant" and len(read) - 1 not in learned:
        read = read[: learned[-1] + 1] if learned else read[:-1]
    return ChatTurns(tuple(read), tuple(learned))


def _without_loss(message: Message) -> Message:
    """Switch off the loss of a prompt's message, unless the message has its own setting."""
    if message["role"] != "assistant" or any(key in message for key in _LOSS_KEYS):
        return message
    return {**message, "weight": 0}


def _is_blank_answer(message: Message) -> bool:
    is_blank = not message["content"].strip() and not message.get("tool_calls")
    return bool(message["role"] == "assistant" and is_blank)


def _carries_loss(message: Message, at: str) -> bool:
    """Return whether a message is an assistant's whose loss is not switched off."""
    for key in _REFUSED_KEYS:
        if key in message:
            raise DataError(
                f"{at} has {key!r}, which would change what is learned and is not supported; "
                'expected "weight": 0 or 1 for a whole turn, and calls as "tool_calls"'
            )
    is_assistant = message["role"] == "assistant"
    for key in _LOSS_KEYS:
        value = message.get(key, is_assistant)
        if not isinstance(value, int | float) or value not in (0, 1):
            raise DataError(
                f"{at} has {key!r}: {value!r}; expected 0 or 1 (false or true): a turn carries "
                "loss or none"
            )
        if value and not is_assistant:
            raise DataError(
                f"{at} ({message['role']}) has {key!r}: {value!r}, but loss lies on the "
                "assistant's turns only; leave the key out, or set it to 0"
            )
    return is_assistant and all(message.get(key, True) for key in _LOSS_KEYS)


def _as_rendered(message: Message, at: str) -> Message:
    """Return the message without loss keys, with arguments of its tool calls as objects."""
    kept = {key: value for key, value in message.items() if key not in _LOSS_KEYS}
    calls = kept.get("tool_calls")
    if not calls:
        return kept
    if not isinstance(calls, list):
        raise DataError(f"{at} has {type(calls).__name__} as 'tool_calls', expected a list")
    read = [_call(call, f"{at}, tool call {number}") for number, call in enumerate(calls, start=1)]
    return {**kept, "tool_calls": read}


def _call(call: Any, at: str) -> Any:
    """Read a call, as {"function": {"name", "arguments"}} or {"name", "arguments"}."""
    if not isinstance(call, Mapping):
        raise DataError(
            f"{at} is {type(call).__name__}, expected an object "
            '{"type": "function", "function": {"name": ..., "arguments": {...}}}'
        )
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _call(call["function"], at)}
    arguments = call.get("arguments")
    if not isinstance(arguments, str):
        return dict(call)
    try:
        parsed = json.loads(arguments) if arguments.strip() else {}
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{at}: its arguments are text that is not JSON ({json_problem(error)}); expected an "
            "object or its JSON text"
        ) from error
    if not isinstance(parsed, dict):
        raise DataError(
            f"{at}: its arguments are JSON text of {type(parsed).__name__}, expected an object"
        )
    return {**call, "arguments": parsed}
