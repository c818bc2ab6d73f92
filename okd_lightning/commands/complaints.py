"""Leaves of jsonargparse's nested error messages, each with its keys, class and given value.

Owns the structure of such a message; ``cli_errors`` explains the leaves.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_type_hints

_KEY = re.compile(r'Parser key "([^"]+)":?\s*')
_CLASS = re.compile(r"Problem with given class_path '([^']+)':\s*")
_CALLABLE = re.compile(r"Type typing\.Callable.* expects a function or a callable class:\s*")
_SUBTYPES = re.compile(r"Subtypes: \[(.*)\]")
_GIVEN = re.compile(r"Given value: (.*?)(?:\. Got value: .*)?$")
_UNION = "Does not validate against any of the Union subtypes"


@dataclass(frozen=True)
class Complaint:
    """One leaf of a message, with the branch that leads to it."""

    text: str
    keys: tuple[str, ...]
    class_path: str | None
    base: str | None
    given: str | None = None

    @property
    def option(self) -> str:
        """The option of this leaf, as typed."""
        return "--" + ".".join(bare(key) for key in self.keys)


def complaints_of(text: str) -> Iterator[Complaint]:
    """Yield the leaves of a nested message, in order."""
    branch: list[tuple[int, str, str]] = []  # indentation, kind, value
    waiting: list[tuple[int, Complaint]] = []  # leaves whose given value is not known yet
    for line in text.splitlines():
        content = line.strip().removeprefix("-").strip()
        indent = len(line) - len(line.lstrip())
        given = _GIVEN.match(content)
        if given:
            yield from (_with_given(c, given.group(1)) for at, c in waiting if at >= indent)
            waiting = [(at, c) for at, c in waiting if at < indent]
        if not content or given or content.startswith(("Errors:", "Given value type:", _UNION)):
            continue
        while branch and branch[-1][0] >= indent:
            branch.pop()
        content = _take_branch(content, indent, branch)
        if content:
            waiting.append((indent, _leaf(content, branch)))
    yield from (complaint for _, complaint in waiting)


def _take_branch(content: str, indent: int, branch: list[tuple[int, str, str]]) -> str:
    """Move what names a key, a class or a base onto the branch; return the remaining text."""
    content = _CALLABLE.sub("", content)
    for what, pattern in (("key", _KEY), ("class", _CLASS), ("base", _SUBTYPES)):
        found = pattern.match(content)
        if found:
            branch.append((indent, what, found.group(1)))
            content = content[found.end() :]
    return content


def _leaf(content: str, branch: Sequence[tuple[int, str, str]]) -> Complaint:
    def last(kind: str) -> str | None:
        return next((value for _, what, value in reversed(branch) if what == kind), None)

    keys = tuple(value for _, what, value in branch if what == "key")
    kinds = [what for _, what, _ in branch]
    is_of_class = kinds[-2:] == ["class", "key"]  # a setting whose type the message does not name
    base = _annotation(last("class"), keys[-1]) if is_of_class else last("base")
    return Complaint(content, keys, last("class"), base)


def _annotation(class_path: str | None, parameter: str) -> str | None:
    """Return the class that a constructor's parameter is annotated with, if it is a single one."""
    kind = imported(class_path) if class_path else None
    try:
        hint = None if kind is None else get_type_hints(kind.__init__).get(parameter)
    except NameError:  # PEFT imports the names of some annotations for type checkers only
        return None
    return f"{hint.__module__}.{hint.__qualname__}" if isinstance(hint, type) else None


def _with_given(complaint: Complaint, given: str) -> Complaint:
    return Complaint(
        complaint.text,
        complaint.keys,
        complaint.class_path,
        complaint.base,
        complaint.given or given,
    )


def worth_saying(complaints: Sequence[Complaint]) -> list[Complaint]:
    """Return the deepest leaves, without a union's None, paths and Lightning's placeholder."""
    real = [
        c
        for c in complaints
        if c.text != "Expected a <class 'NoneType'>"
        and not c.text.startswith("Expected a path but")
        and c.class_path != "lightning.Callback"
        and c.keys + ((c.class_path,) if c.class_path else ())
    ]
    if not real:
        return [c for c in complaints if "NoneType" not in c.text and not c.keys][:1]
    depth = max(len(c.keys) for c in real)
    return [c for c in real if len(c.keys) == depth]


def imported(path: str) -> Any:
    """Return what a dotted path names; None where it cannot be imported."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name, None)
    except (ImportError, ValueError):
        return None


def bare(key: str) -> str:
    """Return a parser key without its subcommand."""
    return re.sub(r"^(fit|validate|test|predict)\.", "", key)
