"""The text of ``--help``: the order of its sections, and lists of classes at a readable length."""

from __future__ import annotations

import argparse
import re
from typing import Any

import jsonargparse

_PLACES = {"A training method": 0, "A student": 1, "Prompts": 2, "options": 4, "Customize": 5}
"""Beginning of a section's title → its place in ``--help``."""

_OWN = 3
"""Place of the options that only one command has."""

_CKPT_PATH = (
    "Checkpoint of a run, or last: the newest one of the run's folder. Its config is used, so "
    "that other options need not be given again."
)
_CLASSES = re.compile(r"known subclasses: ([\w.]+(?:, [\w.]+)*)")
_MOST_CLASSES = 8


def arrange_help(command: str, parser: jsonargparse.ArgumentParser) -> None:
    """Show the method, models and data first and the Trainer's options last; name the command."""
    parser.usage = f"okd-lightning {command} [--config FILE|NAME] [--SECTION.OPTION VALUE ...]"
    # private: argparse has no public way to order the groups of --help, or to change a help text
    parser._action_groups = sorted(parser._action_groups, key=_place)
    if "--ckpt_path" in parser._option_string_actions:
        parser._option_string_actions["--ckpt_path"].help = _CKPT_PATH


def _place(group: Any) -> int:
    title = str(group.title)
    return next((place for start, place in _PLACES.items() if title.startswith(start)), _OWN)


class HelpFormatter(jsonargparse.DefaultHelpFormatter):
    """jsonargparse's formatter, with short names of classes: all of this package, eight others.

    The lists of optimizers, adapters and Lightning's plugins are otherwise half of the text.
    """

    # private: argparse has no public way to change an option's text before it is wrapped
    def _expand_help(self, action: argparse.Action) -> str:
        option = (action.option_strings or [""])[-1].rstrip("+")

        def shortened(found: re.Match[str]) -> str:
            paths = found.group(1).split(", ")
            paths = [path for path in paths if not path.startswith("okd_lightning.commands.")]
            own = [path for path in paths if path.startswith("okd_lightning.")]
            others = [path for path in paths if path not in own]
            more = len(others) - _MOST_CLASSES
            shown = [path.rpartition(".")[2] for path in (*own, *others[:_MOST_CLASSES])]
            listed = ", ".join(shown)
            ending = f" and {more} more" if more > 0 else ""
            return f"classes: {listed}{ending}; settings of one: {option}.help CLASS"

        return _CLASSES.sub(shortened, str(super()._expand_help(action)))
