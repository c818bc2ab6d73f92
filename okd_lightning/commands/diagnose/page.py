"""``diagnosis.html``: one self-contained page, light and dark, for large and small screens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup, escape

from okd_lightning import __version__
from okd_lightning.commands.diagnose.figures import figures
from okd_lightning.commands.diagnose.findings import Advice, Diagnosis
from okd_lightning.commands.diagnose.rules import faults
from okd_lightning.commands.diagnose.stages import duration
from okd_lightning.commands.diagnose.terminal import AUTHORS, SHOWN, STEPS, megabytes, trial_columns
from okd_lightning.commands.diagnose.texts import (
    MEANING,
    SHARES,
    SOURCE_NAMES,
    TextDiagnosis,
    headline,
)

_MARKS = {"good": "✓", "look": "!", "bad": "✗"}


def write_page(path: Path, found: Diagnosis, advice: Sequence[Advice], command: str) -> None:
    """Write the page.

    Args:
        path: The HTML file.
        found: The diagnosis.
        advice: The recommendations.
        command: The comparison to run next.
    """
    text = _template("page.html").render(
        found=found,
        first=advice[0],
        others=advice[1:],
        faults=faults(found),
        good=[check for check in found.checks if check.verdict == "good"],
        command=command,
        figures=figures(found),
        shown=SHOWN,
        trial_columns=trial_columns(found),
        authors=AUTHORS,
        steps=STEPS,
        marks=_MARKS,
        version=__version__,
    )
    path.write_text(text, encoding="utf-8")


def write_text_page(path: Path, found: TextDiagnosis) -> None:
    """Write the page of a pair with two tokenizers.

    Args:
        path: The HTML file.
        found: The diagnosis.
    """
    title, because = headline(found)
    text = _template("texts.html").render(
        found=found,
        title=title,
        because=because,
        is_bad=any(check.verdict == "bad" for check in found.checks),
        shares=SHARES,
        measured=tuple(dict.fromkeys(loss.loss for loss in found.losses)),
        meaning=MEANING,
        names=SOURCE_NAMES,
        marks=_MARKS,
        version=__version__,
    )
    path.write_text(text, encoding="utf-8")


def options_whole(text: str) -> Markup:
    """Return text as HTML whose lines do not break within an option, such as --data.train."""
    return Markup(re.sub(r"(--[\w.]+)", r'<span class="option">\1</span>', str(escape(text))))


def _template(name: str) -> Template:
    environment = Environment(
        loader=PackageLoader("okd_lightning.commands.diagnose", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["megabytes"] = megabytes
    environment.filters["duration"] = duration
    environment.filters["options_whole"] = options_whole
    return environment.get_template(name)
