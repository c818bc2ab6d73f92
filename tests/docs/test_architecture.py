"""docs/architecture.md is true: every file and every name on it exists.

Frozen here: a path in backquotes is a file or folder, below ``okd_lightning/`` or the repository's
root; in a stop of the two journeys each class, method and function in backquotes is defined in one
of that stop's files, or in a file named in the same cell.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "okd_lightning"
PAGE = (ROOT / "docs" / "architecture.md").read_text()
QUOTED = re.compile(r"`([^`]+)`")
PATH = re.compile(r"[\w./]+(\.py|\.md|/)")
STOPS = 3
"""Columns of a stop before its result: its name, its files, its functions."""


def place_of(path: str) -> Path | None:
    """The file or folder that a path on the page means."""
    places = [place for place in (PACKAGE / path, ROOT / path) if place.exists()]
    return places[0] if places else None


def defined_in(path: Path) -> set[str]:
    """Names of a file's functions and classes, with those of their methods."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            members = [m for m in node.body if isinstance(m, ast.FunctionDef | ast.AnnAssign)]
            names = [
                m.name if isinstance(m, ast.FunctionDef) else ast.unparse(m.target) for m in members
            ]
            found |= {f"{node.name}.{name}" for name in names} | set(names)
    return found


def rows() -> list[list[str]]:
    """The cells of the page's stops."""
    cells = [
        [c.strip() for c in line.strip("|").split("|")]
        for line in PAGE.splitlines()
        if line[:1] == "|"
    ]
    return [
        row for row in cells if len(row) == STOPS + 1 and row[0] != "stop" and "---" not in row[0]
    ]


def test_every_path_exists():
    paths = [name for name in QUOTED.findall(PAGE) if PATH.fullmatch(name)]
    assert len(paths) > 80
    assert not [path for path in paths if place_of(path) is None]


def test_every_name_of_a_stop_is_defined_in_its_files():
    assert len(rows()) > 20
    missing = []
    for stop, files, functions, _ in rows():
        known = set()
        for path in (n for cell in (files, functions) for n in QUOTED.findall(cell)):
            place = place_of(path) if PATH.fullmatch(path) else None
            if place is not None and place.suffix == ".py":
                known |= defined_in(place)
        names = [
            n for n in QUOTED.findall(functions) if re.fullmatch(r"[\w.]+", n) and ".py" not in n
        ]
        missing += [f"{stop}: {name}" for name in names if name not in known]
    assert not missing, missing
