"""The text of ``--help``: the order of its sections, and lists of classes at a readable length."""

from __future__ import annotations

import argparse
import re
from typing import Any

import jsonargparse

_SECTIONS = ("A method", "A student", "Prompts", "options", "Runs", "Customize")
_CLASSES = re.compile(r"known subclasses: ([\w.]+(?:, [\w.]+)*)")
_MOST_CLASSES = 8


def section_order(group: Any) -> int:
    """Return the place of a section: the method first, the Trainer's flags last."""
    return next((i for i, start in enumerate(_SECTIONS) if str(group.title).startswith(start)), -1)


class HelpFormatter(jsonargparse.DefaultHelpFormatter):
    """jsonargparse's formatter, with short names of classes: all of this package, eight others.

    The lists of optimizers, adapters and Lightning's plugins are otherwise half of the text.
    """

    # private: argparse has no public way to change an option's text before it is wrapped
    def _expand_help(self, action: argparse.Action) -> str:
        option = (action.option_strings or [""])[-1].rstrip("+")

        def shortened(found: re.Match[str]) -> str:
            paths = found.group(1).split(", ")
            own = [path for path in paths if path.startswith("okd_lightning.")]
            others = [path for path in paths if path not in own]
            more = len(others) - _MOST_CLASSES
            shown = [path.rpartition(".")[2] for path in (*own, *others[:_MOST_CLASSES])]
            listed = ", ".join(shown)
            ending = f" and {more} more" if more > 0 else ""
            return f"classes: {listed}{ending}; settings of one: {option}.help CLASS"

        return _CLASSES.sub(shortened, str(super()._expand_help(action)))
