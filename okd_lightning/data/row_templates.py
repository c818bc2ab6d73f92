"""Prompt templates, texts with column fields, and the checks that all templates share.

A prompt template names columns: ``{instruction} {context}``. Of several templates a row uses the
first whose columns it fills, so that an optional context leaves no empty heading.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

from okd_lightning.data.columns import Columns, RawRow, quoted, read_prompt
from okd_lightning.data.layouts import choose_layout, with_chat_prompts
from okd_lightning.errors import ConfigError, DataError


def fields_of(template: str, option: str, expected: str) -> list[str]:
    """Return the names between braces, with their conversion and format.

    Args:
        template: A text; {{ and }} are literal braces.
        option: How the user named it, for messages.
        expected: Allowed fields, for messages.

    Raises:
        ConfigError: Braces that do not match, or no field at all.
    """
    found = []
    try:
        for _, name, spec, conversion in string.Formatter().parse(template):
            if name is not None:
                behind = (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
                found.append(name + behind)
    except ValueError as error:
        raise ConfigError(f"{option} {template!r}: {error}; {expected}") from error
    if not found:
        raise ConfigError(
            f"{option} {template!r} names no field, so every row would read the same; {expected}"
        )
    return found


_PROMPT_TEMPLATE = "--data.prompt_template"
_COLUMNS = "expected {COLUMN} ({{ and }} for literal braces)"


def prompt_templates(given: str | Sequence[str] | None) -> tuple[str, ...]:
    """Return the prompt templates of the data module's option; () for none.

    Raises:
        ConfigError: A template that is malformed, or has a field that is no plain column name.
    """
    templates = (given,) if isinstance(given, str) else tuple(given or ())
    for template in templates:
        for name in fields_of(template, _PROMPT_TEMPLATE, _COLUMNS):
            if not name or set(name) & set(".[]!:"):
                raise ConfigError(
                    f"{_PROMPT_TEMPLATE} {template!r}: {{{name}}} is not the name of a column; "
                    f"{_COLUMNS}"
                )
    return templates


def with_prompts(
    rows: Sequence[RawRow], columns: Columns, *, needs_response: bool, where: str
) -> tuple[Sequence[RawRow], Columns]:
    """Return the rows with prompts from templates, as chats if ``columns.as_chat``.

    Args:
        rows: The raw rows; with ``--data.as_chat`` they become chats of one user message.
        columns: The columns, with templates and ``as_chat``.
        needs_response: Whether the run learns from dataset responses.
        where: The dataset's name for messages.

    Raises:
        DataError: A field that is not a column, a cell that is not text, a row that fills no
            template, or rows that are chats already.
    """
    if columns.templates:
        rows, columns = _filled(rows, columns, where)
    columns = with_chat_prompts(rows, columns)
    if not columns.as_chat:
        return rows, columns
    as_text = replace(columns, declared_tools=(), tools=Columns().tools, system=None)
    if choose_layout(rows, as_text, needs_response=needs_response, where=where) == "chat":
        raise DataError(f"{where}: the rows are chats already; leave --data.as_chat out")
    return _chats(rows, columns, where)


def _filled(
    rows: Sequence[RawRow], columns: Columns, where: str
) -> tuple[Sequence[RawRow], Columns]:
    fields = [(t, fields_of(t, _PROMPT_TEMPLATE, _COLUMNS)) for t in columns.templates]
    known = {name: None for row in rows for name in row}
    for name in (name for _, names in fields for name in names):
        if name not in known:
            near = get_close_matches(name, list(known), n=1)
            hint = f"; did you mean {{{near[0]}}}?" if near else ""
            raise DataError(
                f"{where}: {_PROMPT_TEMPLATE} names {{{name}}}, which is not a column; "
                f"found: {quoted(known)}{hint}"
            )
    prompt = columns.prompt or "prompt"
    made = [
        {**row, prompt: _fill(row, fields, f"{where}, row {number}")}
        for number, row in enumerate(rows, start=1)
    ]
    return made, replace(columns, prompt=prompt, templates=())


def _fill(row: RawRow, fields: Sequence[tuple[str, list[str]]], at: str) -> str:
    for template, names in fields:
        cells = {name: _text(row.get(name), name, at) for name in names}
        if all(cell.strip() for cell in cells.values()):
            return template.format_map(cells)
    needed = " or ".join(quoted(names) for _, names in fields)
    raise DataError(
        f"{at}: fills no {_PROMPT_TEMPLATE}, which need {needed}; fill or delete the row, or add "
        "a template that needs fewer columns"
    )


def _text(value: Any, name: str, at: str) -> str:
    if value is not None and not isinstance(value, str):
        raise DataError(
            f"{at}: {name!r}, which {_PROMPT_TEMPLATE} names, is {type(value).__name__}, "
            "expected text"
        )
    return value or ""


def _chats(rows: Sequence[RawRow], columns: Columns, where: str) -> tuple[list[RawRow], Columns]:
    messages = columns.messages or "messages"
    chats: list[RawRow] = []
    for number, row in enumerate(rows, start=1):
        content = read_prompt(row, columns, f"{where}, row {number}")
        rest = {name: cell for name, cell in row.items() if name != columns.prompt}
        chats.append({**rest, messages: [{"role": "user", "content": content}]})
    return chats, replace(columns, prompt=None, messages=messages, as_chat=False)
