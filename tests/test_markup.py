"""Frozen here: no text is taken for rich's markup, so that [/INST] in data prints as it is.

* every console of the package is a PrintableConsole, and none of its strings is written as markup;
* a model's answer, a contender's label and an error with brackets are printed unchanged.
"""

from __future__ import annotations

import ast
import io
import re
from pathlib import Path

import pytest
from rich.table import Table

import okd_lightning
from okd_lightning.commands.reports.tables import Answer, answers_table
from okd_lightning.training.lightning_messages import PrintableConsole

FILES = sorted(Path(okd_lightning.__file__).parent.rglob("*.py"))
MARKUP = re.compile(r"\[/?(bold|dim|red|green|yellow|blue|cyan|magenta|italic|underline)\]|\[/\]")
UNWATCHED = {"lightning_messages.py", "progress_bar.py"}  # the class itself; a look at the terminal
HOSTILE = "[INST] a [/INST] [bold]b :smile: [/"


@pytest.mark.parametrize("folder", sorted({path.parent.name for path in FILES}))
def test_no_string_is_markup(folder: str) -> None:
    for path in FILES:
        if path.parent.name == folder:
            check_strings(path)


def check_strings(path: Path) -> None:
    tree = ast.parse(path.read_text())
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            assert not MARKUP.search(node.value), f"{path}:{node.lineno}: use rich.text.Text"
        if isinstance(node, ast.ImportFrom) and node.module == "rich.markup":
            raise AssertionError(f"{path}:{node.lineno}: use rich.text.Text")
        name = getattr(getattr(node, "func", None), "id", None)
        if isinstance(node, ast.Call) and name == "Console" and path.name not in UNWATCHED:
            raise AssertionError(f"{path}:{node.lineno}: use PrintableConsole")


def test_text_is_printed_as_it_is() -> None:
    out = io.StringIO()
    console = PrintableConsole(file=out, width=200)
    console.print(HOSTILE)
    table = Table("label")
    table.add_row(HOSTILE)
    console.print(table)
    console.print(answers_table([Answer(HOSTILE, "r", (("student", HOSTILE),))]))
    assert out.getvalue().count(HOSTILE) == 4
