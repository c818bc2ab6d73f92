"""Which options would read rows whose columns have other names: what errors advise.

A hint is a promise: with the options that it names the rows are read whole. Columns that belong to
the prompt (Alpaca's ``input``, Dolly's ``context``, OpenOrca's ``system_prompt``) are therefore
part of it, as a template. Names are compared without regard to case.
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
"""Prompts that stand behind their context; an instruction stands before it."""


@dataclass(frozen=True)
class Cells:
    """The columns of a data set, each with the first cell of it that is neither null nor empty.

    Attributes:
        samples: Column → cell, in the order in which rows name them.
    """

    samples: Mapping[str, Any]

    @classmethod
    def of(cls, rows: Iterable[RawRow]) -> Cells:
        """Look at all rows: the first one may lack what others have."""
        samples: dict[str, Any] = {}
        for row in rows:
            for name, cell in row.items():
                if name not in samples or samples[name] in (None, "", []):
                    samples[name] = samples.get(name) if cell is None else cell
        return cls(samples)

    def texts(self) -> list[str]:
        """Columns of plain text."""
        return [
            n for n, cell in self.samples.items() if isinstance(cell, str) and not is_chat(cell)
        ]

    def chats(self) -> list[str]:
        """Columns of messages."""
        return [name for name, cell in self.samples.items() if is_chat(cell)]

    def lists(self) -> list[str]:
        """Columns of lists that are no chats (LIMA's texts in turn, Axolotl's segments)."""
        return [
            n for n, cell in self.samples.items() if isinstance(cell, list) and not is_chat(cell)
        ]

    def find(self, role: Role, wanted: str | None, among: Sequence[str]) -> str | None:
        """The column that seems to be meant: of nearly the name wanted, or of a well-known one."""
        passed_over = _SYSTEM if role == "prompt" else ()
        by_name = {
            name.lower(): name
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
    """The option that names the responses of rows whose prompts are found; None where none is."""
    others = [name for name in (*cells.texts(), *cells.chats()) if name != columns.prompt]
    belongs = set(_beside_prompt(cells, columns.prompt))
    return cells.find("response", columns.response, [n for n in others if n not in belongs])


def hint_for_rows(cells: Cells, columns: Columns, *, needs_response: bool) -> str:
    """The options for rows with neither a prompt column nor a chat column of the names wanted.

    Args:
        cells: Of the rows.
        columns: What was looked for.
        needs_response: Whether the run learns from given responses.

    Returns:
        Options with their values; NAME where no column seems to be the one.
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
    """Read a prompt with its response; where there is none and has to be, a whole text."""
    response = hint_for_response(cells, Columns(prompt=prompt, response=wanted))
    if response is not None:
        return f"{prompt_option(cells, prompt)} --data.response_column {response}"
    if needs_response and prompt.lower() in _WHOLE_TEXTS:
        return f"--data.prompt_column null --data.response_column {prompt}"
    return prompt_option(cells, prompt) + " --data.response_column NAME" * needs_response


def messages_option(name: str, cells: Cells, columns: Columns) -> str:
    """Read the chats of a column, and nothing else."""
    option = f"--data.messages_column {name}"
    has_prompt = columns.prompt is not None and columns.prompt in cells.samples
    return f"{option} --data.prompt_column null" if has_prompt else option


def prompt_option(cells: Cells, prompt: str) -> str:
    """Read a prompt together with the columns that belong to it."""
    beside = _beside_prompt(cells, prompt)
    if not beside:
        return f"--data.prompt_column {prompt}"
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
    """Text columns that seem to belong to plain prompts and are not read."""
    read = {columns.prompt, columns.response, *_fields(columns)}
    return [name for name in _beside_prompt(cells, columns.prompt) if name not in read]


def _fields(columns: Columns) -> list[str]:
    return [name for template in columns.templates for name in re.findall(r"{(\w+)}", template)]


def unread_warning(rows: Sequence[RawRow], columns: Columns) -> str | None:
    """What rows say beside what is read of them, with the option that reads it; None for nothing.

    Args:
        rows: Those that can be read.
        columns: What is read of them.
    """
    cells = Cells.of(rows[:_ROWS_LOOKED_AT])
    has_chats = columns.as_chat or columns.messages in cells.samples
    if has_chats or is_chat(cells.samples.get(columns.prompt or "")):
        names = [n for n in cells.texts() if n.lower() in _SYSTEM and cells.samples[n].strip()]
        read = {columns.system, columns.prompt, *_fields(columns)}
        unread = [n for n in names if n not in read] if columns.system is not None else []
        option = f"--data.system_column {unread[0]}" if unread else ""
    elif columns.templates or columns.prompt is None:  # made of what somebody chose
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
    """The system prompt and the context of a row, where it has such columns, with any text."""
    names = [n for n in cells.texts() if n != prompt and cells.samples[n].strip()]
    found = [next((n for n in names if n.lower() in kind), None) for kind in (_SYSTEM, _CONTEXT)]
    return [name for name in found if name is not None]
