"""Columns of a row: prompt, response, chat and tools, with checks of names and types.

Owns the reading of raw cells and the errors about them. Nothing here knows a tokenizer.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, TypeAlias

from okd_lightning.bounded_files import parse_json
from okd_lightning.data.foreign_chats import (
    is_chat,
    listed_messages,
    text_of_parts,
    with_known_keys,
)
from okd_lightning.errors import DataError

RawRow: TypeAlias = Mapping[str, Any]

NO_IMAGES = (
    "the models of this run read text alone; give --model.student (and --model.teacher) a "
    "vision-language model with its processor (docs/images.md)"
)
"""Why a text model's run reads no images."""


@dataclass(frozen=True)
class Columns:
    """The names of the columns that are read.

    Attributes:
        prompt: Text that the model continues; None: rows are chats or, without any, whole texts,
            which are their responses.
        response: The text that follows the prompt.
        messages: A chat, a list of ``{"role": ..., "content": ...}``; None: never read as a chat.
        tools: The tools that a chat may call (JSON schemas), if any.
        declared_tools: Tools of chats whose row has none; () for none.
        templates: Texts with {COLUMN} fields for prompts, of which a row uses the first that it
            fills; () to read the prompt column unchanged.
        as_chat: Whether a prompt is a user message, rendered by the chat template.
        chat_template_kwargs: Further arguments of the chat template.
        system: Text that becomes the first message of a chat; None to read no such column.
        images: Column with the images of a row, one for each ``<image>`` in its text; None to read
            no such column.
        no_images: Why images are not read; None where they are.
        chats_are_prompts: Whether ``messages`` are the prompts of rows whose response is in another
            column (TRL's prompt and completion), so that a completed prompt carries no loss.
    """

    prompt: str | None = "prompt"
    response: str = "response"
    messages: str | None = "messages"
    tools: str = "tools"
    declared_tools: tuple[Mapping[str, Any], ...] = ()
    templates: tuple[str, ...] = ()
    as_chat: bool = False
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    system: str | None = "system"
    images: str | None = "images"
    no_images: str | None = NO_IMAGES
    chats_are_prompts: bool = False


def quoted(names: Collection[str]) -> str:
    """Return names as a list for messages."""
    return ", ".join(repr(name) for name in names) or "none"


def require_column(row: RawRow, role: str, name: str, where: str) -> None:
    """Refuse a dataset without a column that ``--data.<role>_column`` names.

    Raises:
        DataError: The column is missing; the message names those that exist.
    """
    if name not in row:
        near = get_close_matches(name, list(row), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise DataError(
            f"{where}: no column {name!r}, which --data.{role}_column names; "
            f"found: {quoted(row)}{hint}"
        )


def _cell(row: RawRow, name: str, at: str) -> Any:
    if name not in row:
        raise DataError(f"{at}: no column {name!r}, which the first row has; found: {quoted(row)}")
    return row[name]


def require_whole_characters(text: str, what: str) -> None:
    """Refuse a lone surrogate, which JSON can contain and no tokenizer accepts.

    Args:
        text: The text.
        what: File, row and cell, for the message.

    Raises:
        DataError: There is one; the message names it and its position.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise DataError(
            f"{what} holds half a character ({half}, a lone surrogate, at character "
            f"{error.start + 1}): its text was cut or decoded wrongly; fix or delete the row"
        ) from error


def read_prompt(row: RawRow, columns: Columns, at: str) -> str:
    """Return the prompt of a row; ``at`` names file and row for messages.

    Raises:
        DataError: It is missing, not text, empty, or has a lone surrogate.
    """
    assert columns.prompt is not None
    value = _cell(row, columns.prompt, at)
    if not isinstance(value, str):
        hint = " as in the first row" if is_chat(value) else ""
        raise DataError(
            f"{at}: the prompt ({columns.prompt!r}) is {type(value).__name__}, expected text{hint}"
        )
    if not value:
        raise DataError(f"{at}: the prompt ({columns.prompt!r}) is empty; fill or delete the row")
    require_whole_characters(value, f"{at}: the prompt ({columns.prompt!r})")
    return value


def read_response(row: RawRow, columns: Columns, at: str, *, needs_response: bool) -> str:
    """Return the response of a row; empty if there is none.

    Raises:
        DataError: It is not text, it is needed and the column is missing, or it has a lone
            surrogate.
    """
    value = _cell(row, columns.response, at) if needs_response else row.get(columns.response)
    if value is None:
        return ""  # like an empty one
    if not isinstance(value, str):
        hint = "; messages follow a chat: use --data.as_chat true" if is_chat(value) else ""
        raise DataError(
            f"{at}: the response ({columns.response!r}) is {type(value).__name__}, expected text"
            f"{hint}"
        )
    require_whole_characters(value, f"{at}: the response ({columns.response!r})")
    return value


def _read_message(message: object, columns: Columns, at: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise DataError(
            f"{at} is {type(message).__name__}, expected an object "
            '{"role": "user", "content": "..."}'
        )
    given = {key: value for key, value in message.items() if value is not None}
    fields = with_known_keys(given, at)
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
    if isinstance(content, list):
        content = fields["content"] = text_of_parts(content, at, columns.no_images)
    if not isinstance(content, str):
        raise DataError(f'{at} has {type(content).__name__} as "content", expected text')
    return fields


def _listed(value: object, columns: Columns, at: str, what: str) -> list[dict[str, Any]]:
    """Return the messages of a cell, which ``what`` names."""
    found = listed_messages(value)
    if not isinstance(found, list) or not found:
        kind = "an empty list" if found == [] else type(value).__name__
        raise DataError(
            f"{at}: {what} is {kind}, expected a list of messages "
            '{"role": "user", "content": "..."}'
        )
    return [
        _read_message(message, columns, f"{at}: message {number}")
        for number, message in enumerate(found, start=1)
    ]


def _system_message(row: RawRow, columns: Columns, at: str) -> list[dict[str, Any]]:
    """Return the system column as a message, if it has text."""
    value = row.get(columns.system) if columns.system is not None else None
    if value is None or value == "":
        return []
    if not isinstance(value, str):
        raise DataError(
            f"{at}: the system prompt ({columns.system!r}) is {type(value).__name__}, expected "
            "text; if it is none, use --data.system_column null"
        )
    return [{"role": "system", "content": value}]


def read_messages(row: RawRow, columns: Columns, at: str) -> list[dict[str, Any]]:
    """Return the chat of a row without null fields, with "content" always as text.

    Raises:
        DataError: It is not a list of messages with a role and text, begins with the assistant, or
            its system message differs from the system column.
    """
    assert columns.messages is not None
    value = _cell(row, columns.messages, at)
    messages = _listed(value, columns, at, f"the chat ({columns.messages!r})")
    system = _system_message(row, columns, at)
    if system and messages[0]["role"] != "system":
        messages = [*system, *messages]
    elif system and messages[0]["content"] != system[0]["content"]:
        raise DataError(
            f"{at}: the chat has a system message and the row another one in {columns.system!r}; "
            "to read the chat alone use --data.system_column null"
        )
    if messages[0]["role"] == "assistant":
        raise DataError(
            f"{at}: the chat begins with the assistant; expected a system or user message first"
        )
    return messages


def read_answer(row: RawRow, columns: Columns, at: str) -> list[dict[str, Any]]:
    """Return the response column as messages that follow a chat; none if it is missing or blank.

    It is text, or a list of messages, like TRL's conversational completions.

    Raises:
        DataError: It is neither, or does not begin with the assistant.
    """
    value = row.get(columns.response)
    if value is None or (isinstance(value, str) and not is_chat(value)):
        response = read_response(row, columns, at, needs_response=False)
        return [{"role": "assistant", "content": response}] if response.strip() else []
    if value == []:
        return []
    messages = _listed(value, columns, at, f"the response ({columns.response!r})")
    if messages[0]["role"] != "assistant":
        raise DataError(
            f"{at}: the response ({columns.response!r}) begins with {messages[0]['role']!r}, "
            "expected the assistant's message; if it is the whole chat, use --data.messages_column "
            f"{columns.response} --data.prompt_column null"
        )
    return messages


def _schema(tool: Any, what: str) -> Any:
    """Return one tool, parsed if it is JSON text."""
    if not isinstance(tool, str):
        return tool
    return parse_json(tool, DataError, f"{what} hold one that is broken")


def read_tools(row: RawRow, columns: Columns, at: str) -> list[Any] | None:
    """Return the tools of a chat row (a list, or its JSON text), else the declared ones, else None.

    Raises:
        DataError: They are not a list.
    """
    value = row.get(columns.tools)
    if isinstance(value, str) and value.strip():
        value = parse_json(value, DataError, f"{at}: the tools ({columns.tools!r})")
    if not value:
        return [dict(tool) for tool in columns.declared_tools] or None
    if not isinstance(value, list):
        raise DataError(
            f"{at}: the tools ({columns.tools!r}) are {type(value).__name__}, "
            "expected a list of JSON schemas"
        )
    return [_schema(tool, f"{at}: the tools ({columns.tools!r})") for tool in value]
