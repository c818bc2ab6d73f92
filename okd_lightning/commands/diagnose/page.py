"""``diagnosis.html``: one self-contained page, light and dark, for large and small screens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from okd_lightning import __version__
from okd_lightning.commands.diagnose.figures import figures
from okd_lightning.commands.diagnose.findings import Advice, Diagnosis
from okd_lightning.commands.diagnose.rules import faults
from okd_lightning.commands.diagnose.stages import duration
from okd_lightning.commands.diagnose.terminal import AUTHORS, SHOWN, megabytes, trial_columns

_MARKS = {"good": "✓", "look": "!", "bad": "✗"}


def write_page(path: Path, found: Diagnosis, advice: Sequence[Advice], command: str) -> None:
    """Write the page.

    Args:
        path: The HTML file.
        found: The diagnosis.
        advice: The recommendations.
        command: The comparison to run next.
    """
    environment = Environment(
        loader=PackageLoader("okd_lightning.commands.diagnose", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["megabytes"] = megabytes
    environment.filters["duration"] = duration
    text = environment.get_template("page.html").render(
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
        marks=_MARKS,
        version=__version__,
    )
    path.write_text(text, encoding="utf-8")
