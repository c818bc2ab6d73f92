"""Stored answers that need no parser: the index of options, and the text of ``COMMAND --help``.

The parsers cost ten seconds of imports. Their options and help texts are therefore stored in
``option_index.json``; ``make golden`` writes the file, and a test compares it with the parsers.
"""

from __future__ import annotations

import json
import re
import shutil
import textwrap
from collections.abc import Sequence
from importlib import metadata, resources
from typing import Any

INDEX = "option_index.json"

# argparse's layout: an option's help begins in this column, after or below the option
_ENTRY = re.compile(r"(?=.{24}\S)( {24}|  -.*  )(.+)")
_MARGIN = 2


def stored_index() -> dict[str, Any] | None:
    """Return the stored index; None for another release of Lightning."""
    text = resources.files(__package__).joinpath(INDEX).read_text(encoding="utf-8")
    index: dict[str, Any] = json.loads(text)
    return index if index["lightning"] == metadata.version("lightning") else None


def stored_help(command: str, words: Sequence[str]) -> str | None:
    """Return what ``--help`` prints, as wide as the terminal.

    Args:
        command: The command.
        words: The words after it.

    Returns:
        None where the words do not ask for help, and where the parser must answer.
    """
    index = stored_index() if "-h" in words or "--help" in words else None
    if index is None:
        return None
    sections = [index["sections"][number] for number in index["help"][command]]
    width = shutil.get_terminal_size().columns - _MARGIN
    return "\n\n".join("\n".join(_wrapped(line, width) for line in part) for part in sections)


def _wrapped(line: str, width: int) -> str:
    entry = _ENTRY.fullmatch(line)
    if entry is None and (line.startswith(("usage:", "  -")) or line.endswith(":")):
        return line  # argparse breaks neither these nor headings
    head, text = entry.groups() if entry else ("", line)
    return textwrap.fill(text, width, initial_indent=head, subsequent_indent=" " * len(head))
