"""Views of a prompt with its answers: terminal table, Markdown and JSON record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from okd_lightning.errors import printable

_MARKUP = "&<>|`*_[]\\~#"


@dataclass(frozen=True)
class Sample:
    """A prompt and its answers, as text; None for a missing answer.

    Attributes:
        index: Row of the dataset.
        prompt: The student's prompt; of a chat the user's last message.
        teacher: The teacher's answer.
        student_before: The student's before training.
        student_now: The student's now.
    """

    index: int
    prompt: str
    teacher: str | None
    student_before: str | None
    student_now: str

    @property
    def answers(self) -> dict[str, str]:
        """The existing answers, by their generator."""
        given = {
            "teacher": self.teacher,
            "student before": self.student_before,
            "student now": self.student_now,
        }
        return {who: text for who, text in given.items() if text is not None}

    def record(self) -> dict[str, Any]:
        """Return the record for ``rollouts.jsonl``."""
        answers = {who.replace(" ", "_"): text for who, text in self.answers.items()}
        return {"index": self.index, "prompt": self.prompt, **answers}


def samples_table(samples: Sequence[Sample], title: str, console: Console, lines: int = 2) -> Table:
    """Return a table with a block per prompt and a row per answer; long texts end in an ellipsis.

    Args:
        samples: At least one.
        title: Title above the table.
        console: The console, whose width determines the layout.
        lines: Most lines of a text.
    """
    table = Table(title=title, title_justify="left", box=SIMPLE, show_header=False, expand=True)
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    width = max(10, console.width - max(len(who) for who in samples[0].answers) - 7)
    for sample in samples:
        table.add_row("prompt", _cut(sample.prompt, console, width, lines), style="bold")
        for who, text in sample.answers.items():
            table.add_row(who, _cut(text, console, width, lines))
        table.add_section()
    return table


def samples_markdown(samples: Sequence[Sample]) -> str:
    """Return a Markdown table, a line per prompt, with whole texts and escaped markup."""
    header = ["prompt", *samples[0].answers]
    rows = [[sample.prompt, *sample.answers.values()] for sample in samples]
    cells = [header, ["---"] * len(header), *([_cell(text) for text in row] for row in rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _cut(text: str, console: Console, width: int, num_lines: int) -> Text:
    """Cut a text to a few lines, with collapsed white space and escaped control characters."""
    readable = printable(_blanks(text))
    lines = Text(readable or "(nothing)", style="" if readable else "dim").wrap(console, width)
    kept = list(lines[:num_lines])
    if len(lines) > num_lines:
        kept[-1].truncate(width - 1)
        kept[-1].rstrip()
        kept[-1].append("…")
    return Text("\n").join(kept)


def _blanks(text: str) -> str:
    return " ".join(text.split())


def _cell(text: str) -> str:
    """Escape the markup of Markdown and HTML."""
    return "".join(f"&#{ord(c)};" if c in _MARKUP else c for c in _blanks(text) or "(nothing)")
