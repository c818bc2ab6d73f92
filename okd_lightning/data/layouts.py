"""Layout of a dataset's rows: prompts with responses, chats, or whole texts.

Owns the choice of the layout and the errors about missing columns; ``column_hints`` owns their
advice.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, TypeAlias

from okd_lightning.data.column_hints import (
    Cells,
    hint_for_response,
    hint_for_rows,
    messages_option,
    prompt_option,
    unread_beside,
)
from okd_lightning.data.columns import Columns, RawRow, quoted, require_column
from okd_lightning.data.foreign_chats import (
    is_chat,
    is_python_text,
    listed_messages,
    role_of,
)
from okd_lightning.errors import DataError

Layout: TypeAlias = Literal["text", "chat"]

_MESSAGE_OF_A_TREE = {"parent_id", "role", "text"}
"""Columns of OpenAssistant's message trees, whose rows are single messages."""

_A_CHAT = (
    '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'
)


def with_chat_prompts(rows: Sequence[RawRow], columns: Columns) -> Columns:
    """Return columns that read prompts made of messages (TRL's conversational rows) as chats."""
    if columns.prompt is None or columns.messages in rows[0]:
        return columns
    if not is_chat(rows[0].get(columns.prompt)):
        return columns
    return replace(columns, prompt=None, messages=columns.prompt, chats_are_prompts=True)


def _check_mapped(rows: Sequence[RawRow], columns: Columns, where: str) -> None:
    """Refuse rows none of which has a column that the user named, needed or not."""
    default = Columns()
    row = {name: None for row in rows for name in row}
    for role in ("prompt", "response", "messages", "tools", "system", "images"):
        name = getattr(columns, role)
        if name is not None and name != getattr(default, role):
            require_column(row, role, name, where)


def _check_labels(rows: Sequence[RawRow], where: str) -> None:
    """Refuse unpaired preference rows with a rejected answer (TRL's, ms-swift's)."""
    for number, row in enumerate(rows, start=1):
        label = row.get("label")
        is_false = label is False or (isinstance(label, str) and label.strip().lower() == "false")
        if not is_false or not {"completion", "messages"} & set(row):
            continue
        raise DataError(
            f"{where}, row {number}: the label of this answer is false, so it shows what not "
            "to answer, and this run would learn it; leave such rows out of the file"
        )


def _no_prompt(
    rows: Sequence[RawRow], columns: Columns, *, needs_response: bool, where: str
) -> DataError:
    cells = Cells.of(rows)
    wanted = [name for name in (columns.prompt, columns.messages) if name is not None]
    if later := [name for name in wanted if name in cells.samples]:
        return _first_lacks(later[0], where)
    missing = " and no ".join(repr(name) for name in wanted) or "to read"
    if set(cells.samples) >= _MESSAGE_OF_A_TREE:
        return DataError(
            f"{where}: each row is one message of a conversation; found: {quoted(cells.samples)}; "
            f"join every conversation into one row, {_A_CHAT}"
        )
    options = hint_for_rows(cells, columns, needs_response=needs_response)
    if "NAME" in options and (lists := cells.lists()):
        return DataError(
            f"{where}: no column {missing}; found: {quoted(cells.samples)}; {quoted(lists)} "
            f"hold{'s' * (len(lists) == 1)} a list that is not a chat: turn each row into {_A_CHAT}"
        )
    return DataError(
        f"{where}: no column {missing}; found: {quoted(cells.samples)}{_unused(cells, options)}; "
        f"use {options}"
    )


def _no_response(
    rows: Sequence[RawRow], columns: Columns, where: str, *, is_chat_row: bool
) -> DataError:
    cells = Cells.of(rows)
    if columns.response in cells.samples:
        return _first_lacks(columns.response, where)
    start = (
        f"{where}: no column {columns.response!r}, and this run learns from dataset responses; "
        f"found: {quoted(cells.samples)}"
    )
    name = hint_for_response(cells, columns)
    if name is None:
        return DataError(
            f"{start}; use --data.response_column NAME, or a method that needs prompts only "
            "(--method GKD --method.on_policy_fraction 1)"
        )
    options = f"--data.response_column {shlex.quote(name)}"
    if is_chat_row or columns.prompt is None:
        return DataError(f"{start}{_unused(cells, options)}; use {options}")
    if _is_whole_chat(cells.samples[name]):
        options = messages_option(name, cells, columns)
    elif not columns.templates and unread_beside(cells, columns):
        options = f"{prompt_option(cells, columns.prompt)} {options}"
    return DataError(f"{start}{_unused(cells, options)}; use {options}")


def _first_lacks(name: str, where: str) -> DataError:
    return DataError(
        f"{where}, row 1: no column {name!r}, which later rows have; fill or delete such rows"
    )


def _is_whole_chat(cell: object) -> bool:
    """Return whether a cell holds a chat from its beginning, not an answer alone."""
    messages = listed_messages(cell)
    if not is_chat(cell) or not isinstance(messages, list):
        return False
    return role_of(messages[0]) != "assistant"


def _unused(cells: Cells, options: str) -> str:
    """Return a note if the options read one of two responses."""
    is_preference = options.endswith(" chosen") or " chosen " in options
    return "; 'rejected' is not used" if is_preference and "rejected" in cells.samples else ""


def _both(
    rows: Sequence[RawRow], columns: Columns, *, needs_response: bool, where: str
) -> DataError:
    start = (
        f"{where}: both a prompt column {columns.prompt!r} and a chat column {columns.messages!r}"
    )
    if needs_response and columns.response not in rows[0]:
        return DataError(f"{start}; to read the chats use --data.prompt_column null")
    return DataError(
        f"{start}; to read the chats use --data.prompt_column null, "
        "to read the prompts use --data.messages_column null"
    )


def choose_layout(
    rows: Sequence[RawRow], columns: Columns, *, needs_response: bool, where: str
) -> Layout:
    """Return the layout of a dataset, from its first row.

    Whole texts ("text" with ``columns.prompt`` None) are responses without a prompt.

    Args:
        rows: At least one; further rows are read only for errors.
        columns: The configured columns.
        needs_response: Whether the run learns from dataset responses.
        where: The dataset's name for messages.

    Raises:
        DataError: A column is missing, or there are prompts and chats and no option chooses.
    """
    row = rows[0]
    _check_mapped(rows, columns, where)
    if needs_response:
        _check_labels(rows, where)
    has_prompt = columns.prompt is not None and columns.prompt in row
    has_messages = columns.messages is not None and columns.messages in row
    if has_prompt and has_messages:
        raise _both(rows, columns, needs_response=needs_response, where=where)
    has_response = columns.response in row
    if columns.messages is not None and has_messages:
        if needs_response and not has_response and _is_open(row[columns.messages]):
            _require_answers(rows, columns, where)
        return "chat"
    is_whole = columns.prompt is None and has_response and not is_chat(row[columns.response])
    if not has_prompt and not is_whole:
        raise _no_prompt(rows, columns, needs_response=needs_response, where=where)
    if columns.declared_tools:
        raise DataError(
            f"{where}: the rows are plain prompts, and --data.tools are called in chats; give rows "
            "with messages (--data.messages_column NAME), set --data.as_chat true, or leave the "
            "tools out"
        )
    _check_chat_columns(columns, where)
    if needs_response and not has_response:
        raise _no_response(rows, columns, where, is_chat_row=False)
    for name in (columns.prompt, columns.response):
        if is_python_text(row.get(name or "")):
            raise DataError(
                f"{where}, row 1: {name!r} is a list of messages as Python prints it, which would "
                "be read as plain text; write it as JSON (json.dumps), or the rows into .jsonl"
            )
    return "text"


def _check_chat_columns(columns: Columns, where: str) -> None:
    """Refuse columns that the user named and that plain prompts do not read."""
    default = Columns()
    for role in ("tools", "system"):
        name = getattr(columns, role)
        if name is not None and name != getattr(default, role):
            raise DataError(
                f"{where}: the rows are plain prompts, and --data.{role}_column {name} is read in "
                "chats; set --data.as_chat true, or leave it out"
            )


def _is_open(cell: object) -> bool:
    """Return whether a chat ends with a user message."""
    messages = listed_messages(cell)
    if not is_chat(cell) or not isinstance(messages, list) or not isinstance(messages[-1], dict):
        return False
    return role_of(messages[-1]) == "user"


def _require_answers(rows: Sequence[RawRow], columns: Columns, where: str) -> None:
    """Refuse chats without answers if another column seems to have the answers."""
    others = [name for name in (columns.messages, columns.tools, columns.system) if name]
    cells = Cells({n: c for n, c in Cells.of(rows).samples.items() if n not in others})
    if hint_for_response(cells, columns) is not None:
        raise _no_response(rows, columns, where, is_chat_row=True)
