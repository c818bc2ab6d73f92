"""Hints in error messages: the options that read rows whose columns have other names.

The options of a hint read the whole row. Columns that belong to the prompt (Alpaca's
``input``, Dolly's ``context``, OpenOrca's ``system_prompt``) are therefore included, as a template.
Names are compared without regard to case.
"""

from __future__ import annotations

import itertools
import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal, TypeAlias

from okd_lightning.data.columns import Columns, RawRow
from okd_lightning.data.foreign_chats import is_chat

Role: TypeAlias = Literal["prompt", "response", "messages"]

_WELL_KNOWN: Mapping[Role, tuple[str, ...]] = {
    "prompt": (
        *("question", "instruction", "query", "input", "inputs", "problem", "user", "human"),
        *("text", "content", "article", "document", "dialogue", "context", "q"),
    ),
    "response": (
        *("answer", "output", "outputs", "completion", "solution", "canonical_solution"),
        *("target", "targets", "assistant", "bot", "gpt", "chosen", "code", "summary"),
        *("highlights", "ideal", "label", "final_answer", "a"),
    ),
    "messages": ("conversations", "conversation", "chat", "dialogue", "dialog", "chosen"),
}
_SYSTEM = ("system_prompt", "system")
_CONTEXT = ("input", "context", "passage", "article", "document")
_ROWS_LOOKED_AT = 1000  # for the warning; an error looks at all
_WHOLE_TEXTS = ("text", "content")
_ASKED_LAST = ("question", "query")
"""Prompt columns that follow their context; an instruction precedes it."""


@dataclass(frozen=True)
class Cells:
    """The columns of a dataset, each with its first cell that is neither null nor empty.

    Attributes:
        samples: Column → cell, in the order of the rows' columns.
    """

    samples: Mapping[str, Any]

    @classmethod
    def of(cls, rows: Iterable[RawRow]) -> Cells:
        """Read all rows: the first one may lack columns of others."""
        samples: dict[str, Any] = {}
        for row in rows:
            for name, cell in row.items():
                known = samples.get(name)
                if known is None or (isinstance(known, str | list) and not known):
                    samples[name] = known if cell is None else cell
        return cls(samples)

    def texts(self) -> list[str]:
        """Return the columns of plain text."""
        return [
            n for n, cell in self.samples.items() if isinstance(cell, str) and not is_chat(cell)
        ]

    def chats(self) -> list[str]:
        """Return the columns of messages."""
        return [name for name, cell in self.samples.items() if is_chat(cell)]

    def lists(self) -> list[str]:
        """Return the columns of lists that are not chats (LIMA's texts, Axolotl's segments)."""
        return [
            n for n, cell in self.samples.items() if isinstance(cell, list) and not is_chat(cell)
        ]

    def find(self, role: Role, wanted: str | None, among: Sequence[str]) -> str | None:
        """Return the likely column: of a name similar to ``wanted``, or of a well-known name."""
        passed_over = _SYSTEM if role == "prompt" else ()
        by_name = {
            name.strip().lower(): name
            for name in reversed(among)
            if name.lower() not in passed_over and not name.lower().endswith("id")
        }
        stem = (wanted or role).lower()
        if len([name for name in by_name if name.startswith(stem)]) > 1:
            return None  # response_a and response_b: either would be a guess
        near = get_close_matches(stem, list(by_name), n=1)
        known = (name for name in _WELL_KNOWN[role] if name in by_name)
        found = near[0] if near else next(known, None)
        return by_name[found] if found is not None else None


def hint_for_response(cells: Cells, columns: Columns) -> str | None:
    """Return the likely response column of rows whose prompts are found; None without one."""
    others = [name for name in (*cells.texts(), *cells.chats()) if name != columns.prompt]
    belongs = set(_beside_prompt(cells, columns.prompt))
    return cells.find("response", columns.response, [n for n in others if n not in belongs])


def hint_for_rows(cells: Cells, columns: Columns, *, needs_response: bool) -> str:
    """Return the options for rows that have neither the prompt column nor the chat column.

    Args:
        cells: Columns of the rows.
        columns: The configured column names.
        needs_response: Whether the run learns from dataset responses.

    Returns:
        Options with their values; NAME if no column is likely.
    """
    chat = cells.find("messages", columns.messages, cells.chats())
    prompt = cells.find("prompt", columns.prompt, cells.texts() or cells.chats())
    if chat is None and prompt is None and len(cells.chats()) == 1:
        chat = cells.chats()[0]
    if chat is not None:
        return messages_option(chat, cells, columns)
    if columns.prompt is None:
        return "--data.messages_column NAME"
    has_response = columns.response in cells.samples
    if prompt is not None and has_response:
        return prompt_option(cells, prompt)
    if prompt is not None:
        return _pair_option(cells, prompt, columns.response, needs_response=needs_response)
    if {"chosen", "rejected"} <= set(cells.texts()):
        return "--data.prompt_column null --data.response_column chosen"
    is_open = needs_response and not has_response
    return "--data.prompt_column NAME" + " --data.response_column NAME" * is_open


def _pair_option(cells: Cells, prompt: str, wanted: str, *, needs_response: bool) -> str:
    """Return the options for a prompt with its response; if it is missing, for whole texts."""
    response = hint_for_response(cells, Columns(prompt=prompt, response=wanted))
    if response is not None:
        return f"{prompt_option(cells, prompt)} --data.response_column {shlex.quote(response)}"
    if needs_response and prompt.lower() in _WHOLE_TEXTS:
        return f"--data.prompt_column null --data.response_column {shlex.quote(prompt)}"
    return prompt_option(cells, prompt) + " --data.response_column NAME" * needs_response


def messages_option(name: str, cells: Cells, columns: Columns) -> str:
    """Return the options that read only the chats of a column."""
    option = f"--data.messages_column {shlex.quote(name)}"
    has_prompt = columns.prompt is not None and columns.prompt in cells.samples
    return f"{option} --data.prompt_column null" if has_prompt else option


def prompt_option(cells: Cells, prompt: str) -> str:
    """Return the option that reads a prompt with the columns that belong to it."""
    beside = _beside_prompt(cells, prompt)
    if not beside:
        return f"--data.prompt_column {shlex.quote(prompt)}"
    before = [n for n in beside if n.lower() in _SYSTEM or prompt.lower() in _ASKED_LAST]
    order = [*before, prompt, *(name for name in beside if name not in before)]
    subsets = [
        set(some)
        for size in range(len(beside), -1, -1)
        for some in itertools.combinations(beside, size)
    ]
    templates = [
        "\n\n".join(f"{{{name}}}" for name in order if name == prompt or name in some)
        for some in subsets
    ]
    return f"--data.prompt_template {shlex.quote(json.dumps(templates, separators=(',', ':')))}"


def unread_beside(cells: Cells, columns: Columns) -> list[str]:
    """Return the text columns that seem to belong to plain prompts and are not read."""
    read = {columns.prompt, columns.response, *_fields(columns)}
    return [name for name in _beside_prompt(cells, columns.prompt) if name not in read]


def _fields(columns: Columns) -> list[str]:
    return [name for template in columns.templates for name in re.findall(r"{(\w+)}", template)]


def unread_warning(rows: Sequence[RawRow], columns: Columns) -> str | None:
    """Return a warning about columns that are not read, with the option; None for none.

    Args:
        rows: The rows.
        columns: The columns that are read.
    """
    cells = Cells.of(rows[:_ROWS_LOOKED_AT])
    has_chats = columns.as_chat or columns.messages in cells.samples
    if has_chats or is_chat(cells.samples.get(columns.prompt or "")):
        names = [n for n in cells.texts() if n.lower() in _SYSTEM and cells.samples[n].strip()]
        read = {columns.system, columns.prompt, *_fields(columns)}
        unread = [n for n in names if n not in read] if columns.system is not None else []
        option = f"--data.system_column {shlex.quote(unread[0])}" if unread else ""
    elif columns.templates or columns.prompt is None:  # the user chose the columns
        return None
    else:
        unread = unread_beside(cells, columns)
        option = prompt_option(cells, columns.prompt)
    if not unread and isinstance(cells.samples.get("history"), list) and cells.samples["history"]:
        return "column 'history' of the rows is not read; to train on it turn rows into messages"
    if not unread:
        return None
    many = "s" * (len(unread) > 1)
    return (
        f"column{many} {', '.join(map(repr, unread))} of the rows, which seem{'s' * (not many)} to "
        f"belong to the prompt, {'are' if many else 'is'} not read; to read it use {option}"
    )


def _beside_prompt(cells: Cells, prompt: str | None) -> list[str]:
    """Return the columns of system prompt and context, if there are any with text."""
    names = [n for n in cells.texts() if n != prompt and cells.samples[n].strip()]
    found = [next((n for n in names if n.lower() in kind), None) for kind in (_SYSTEM, _CONTEXT)]
    return [name for name in found if name is not None]
