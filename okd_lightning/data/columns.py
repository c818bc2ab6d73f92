"""Which column of a row is the prompt, the response or the chat; checks names and types.

Owns the reading of raw cells and the messages about them. Nothing here knows a tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal, TypeAlias

from okd_lightning.errors import DataError

RawRow: TypeAlias = Mapping[str, Any]
Layout: TypeAlias = Literal["text", "chat"]

_WELL_KNOWN = {
    "prompt": ("question", "instruction", "query", "input", "problem", "text"),
    "response": ("answer", "output", "completion", "solution", "target"),
    "messages": ("conversations", "conversation", "chat", "dialogue", "dialog"),
}


@dataclass(frozen=True)
class Columns:
    """The names of the columns that are read.

    Attributes:
        prompt: Text that the model continues; None: this data set is read as a chat.
        response: The text that follows it.
        messages: A chat, a list of ``{"role": ..., "content": ...}``; None: never read as a chat.
        tools: The tools that a chat may call (JSON schemas), where there are any.
        declared_tools: What chats may call whose row names no tools; () for nothing.
        templates: What prompts are made of: texts with {COLUMN} fields, of which a row takes the
            first that it fills; () to read the prompt column as it is.
        as_chat: Whether a prompt is a user's message, which the chat template renders.
        chat_template_kwargs: What the chat template is told beside the chat.
    """

    prompt: str | None = "prompt"
    response: str = "response"
    messages: str | None = "messages"
    tools: str = "tools"
    declared_tools: tuple[Mapping[str, Any], ...] = ()
    templates: tuple[str, ...] = ()
    as_chat: bool = False
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)


def quoted(names: Collection[str]) -> str:
    """Names as messages list them."""
    return ", ".join(repr(name) for name in names) or "none"


def _suggestion(role: str, wanted: str, found: Sequence[str]) -> str | None:
    known = next((name for name in _WELL_KNOWN[role] if name in found), None)
    near = get_close_matches(wanted, found, n=1)
    return near[0] if near else known


def _option(role: str, wanted: str, found: Sequence[str]) -> str:
    return f"--data.{role}_column {_suggestion(role, wanted, found) or 'NAME'}"


def require_column(row: RawRow, role: str, name: str, where: str) -> None:
    """Refuse a data set without a column that ``--data.<role>_column`` names.

    Raises:
        DataError: Naming the columns that there are.
    """
    if name not in row:
        near = get_close_matches(name, list(row), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise DataError(
            f"{where}: no column {name!r}, which --data.{role}_column names; "
            f"found: {quoted(row)}{hint}"
        )


def _check_mapped(row: RawRow, columns: Columns, where: str) -> None:
    """A column that the user named must be there, needed or not."""
    default = Columns()
    for role in ("prompt", "response", "messages", "tools"):
        name = getattr(columns, role)
        if name is not None and name != getattr(default, role):
            require_column(row, role, name, where)


def _no_prompt(row: RawRow, columns: Columns, where: str) -> DataError:
    found = list(row)
    wanted = [name for name in (columns.prompt, columns.messages) if name is not None]
    chat = next((name for name in _WELL_KNOWN["messages"] if name in found), None)
    if columns.prompt is None or (chat and not _suggestion("prompt", columns.prompt, found)):
        options = f"--data.messages_column {chat or 'NAME'}"
    else:
        options = _option("prompt", columns.prompt, found)
        if columns.response not in found and _suggestion("response", columns.response, found):
            options += f" {_option('response', columns.response, found)}"
    missing = " and no ".join(repr(name) for name in wanted) or "to read"
    return DataError(f"{where}: no column {missing}; found: {quoted(found)}; use {options}")


def choose_layout(row: RawRow, columns: Columns, *, needs_response: bool, where: str) -> Layout:
    """Tell from a data set's first row whether it holds prompts or chats.

    Raises:
        DataError: A column is missing, or both kinds are there and nothing says which one to read.
    """
    _check_mapped(row, columns, where)
    has_prompt = columns.prompt is not None and columns.prompt in row
    has_messages = columns.messages is not None and columns.messages in row
    if has_prompt and has_messages:
        raise DataError(
            f"{where}: both a prompt column {columns.prompt!r} and a chat column "
            f"{columns.messages!r}; to read the chats use --data.prompt_column null, "
            "to read the prompts use --data.messages_column null"
        )
    if has_messages:
        return "chat"
    if not has_prompt:
        raise _no_prompt(row, columns, where)
    if columns.declared_tools:
        raise DataError(
            f"{where}: the rows are plain prompts, and --data.tools are called in chats; give rows "
            "with messages (--data.messages_column NAME), set --data.as_chat true, or leave the "
            "tools out"
        )
    if needs_response and columns.response not in row:
        raise DataError(
            f"{where}: no column {columns.response!r}, and this run learns from given responses; "
            f"found: {quoted(row)}; use "
            f"{_option('response', columns.response, [c for c in row if c != columns.prompt])}"
        )
    return "text"


def _cell(row: RawRow, name: str, at: str) -> Any:
    if name not in row:
        raise DataError(f"{at}: no column {name!r}, which the first row has; found: {quoted(row)}")
    return row[name]


def _looks_like_chat(value: object) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)


def require_whole_characters(text: str, what: str) -> None:
    """Refuse a text that no tokenizer takes: half of a surrogate pair, which JSON can hold.

    Args:
        text: What will be tokenized.
        what: File, row and cell, for the message.

    Raises:
        DataError: Naming the half and where it stands.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise DataError(
            f"{what} holds half a character ({half}, a lone surrogate, at character "
            f"{error.start + 1}): its text was cut or decoded wrongly; mend or delete the row"
        ) from error


def read_prompt(row: RawRow, columns: Columns, at: str) -> str:
    """The prompt of a row; ``at`` names file and row for messages.

    Raises:
        DataError: It is missing, not text, empty, or holds half a character.
    """
    assert columns.prompt is not None
    value = _cell(row, columns.prompt, at)
    if not isinstance(value, str):
        hint = (
            f"; if it is a chat, use --data.messages_column {columns.prompt} "
            "--data.prompt_column null"
            if _looks_like_chat(value)
            else ""
        )
        raise DataError(
            f"{at}: the prompt ({columns.prompt!r}) is {type(value).__name__}, expected text{hint}"
        )
    if not value:
        raise DataError(f"{at}: the prompt ({columns.prompt!r}) is empty; fill or delete the row")
    require_whole_characters(value, f"{at}: the prompt ({columns.prompt!r})")
    return value


def read_response(row: RawRow, columns: Columns, at: str, *, needs_response: bool) -> str:
    """The response of a row; empty where it has none.

    Raises:
        DataError: It is not text, or it is needed and the row has no such column; or it holds half
            a character.
    """
    value = _cell(row, columns.response, at) if needs_response else row.get(columns.response)
    if value is None:
        return ""  # like an empty one
    if not isinstance(value, str):
        raise DataError(
            f"{at}: the response ({columns.response!r}) is {type(value).__name__}, expected text"
        )
    require_whole_characters(value, f"{at}: the response ({columns.response!r})")
    return value


def _read_message(message: object, at: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise DataError(
            f"{at} is {type(message).__name__}, expected an object "
            '{"role": "user", "content": "..."}'
        )
    fields = {key: value for key, value in message.items() if value is not None}
    if not isinstance(fields.get("role"), str):
        raise DataError(
            f'{at} has no text as "role"; found: {quoted(message)}; '
            'expected {"role": "user", "content": "..."}'
        )
    if "content" not in fields and not fields.get("tool_calls"):
        raise DataError(
            f'{at} has no "content"; found: {quoted(fields)}; '
            'expected {"role": "user", "content": "..."}'
        )
    content = fields.setdefault("content", "")
    if not isinstance(content, str):
        raise DataError(f'{at} has {type(content).__name__} as "content", expected text')
    return fields


def read_messages(row: RawRow, columns: Columns, at: str) -> list[dict[str, Any]]:
    """The chat of a row, fields that are null left out, "content" always text.

    Raises:
        DataError: It is not a list of messages with a role and text, or begins with the assistant.
    """
    assert columns.messages is not None
    value = _cell(row, columns.messages, at)
    if not isinstance(value, list) or not value:
        found = "an empty list" if value == [] else type(value).__name__
        raise DataError(
            f"{at}: the chat ({columns.messages!r}) is {found}, expected a list of messages "
            '{"role": "user", "content": "..."}'
        )
    messages = [
        _read_message(message, f"{at}: message {number}")
        for number, message in enumerate(value, start=1)
    ]
    if messages[0]["role"] == "assistant":
        raise DataError(
            f"{at}: the chat begins with the assistant; expected a system or user message first"
        )
    return messages


def read_tools(row: RawRow, columns: Columns, at: str) -> list[Any] | None:
    """The tools of a chat row (a list, or its JSON text), else the declared ones; None for none.

    Raises:
        DataError: They are not a list.
    """
    value = row.get(columns.tools)
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{at}: the tools ({columns.tools!r}) are not valid JSON ({error.msg})"
            ) from error
    if not value:
        return [dict(tool) for tool in columns.declared_tools] or None
    if not isinstance(value, list):
        raise DataError(
            f"{at}: the tools ({columns.tools!r}) are {type(value).__name__}, "
            "expected a list of JSON schemas"
        )
    return value
