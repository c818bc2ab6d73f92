"""Unknown options and methods: their messages, and a check before slow imports.

The options of the commands and the names of methods are stored (``stored_help``), so that a
mistyped one is reported before torch and transformers are imported. Everything that the index
cannot decide, and every option that is refused with an explanation of its own, is left to the
command.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from itertools import zip_longest

from okd_lightning.commands.foreign_options import hint_for
from okd_lightning.commands.stored_help import stored_index
from okd_lightning.errors import UsageError

MOST_NAMES = 25

_MISTYPED = 0.85
"""Similarity of two names from which one is the other, mistyped."""

_ON_FIT = ("compare", "diagnose")
"""Commands with the options of ``fit`` and some of their own."""


def check_names(command: str, words: Sequence[str]) -> None:
    """Refuse an option or a method that does not exist.

    Args:
        command: The command.
        words: The words after it.

    Raises:
        UsageError: The message that the parser would give.
    """
    index = stored_index()
    if index is None or command not in index["options"] or "-h" in words or "--help" in words:
        return
    base = index["options"]["fit"] if command in _ON_FIT else []
    options, methods = base or index["options"][command], index["methods"]
    known = {*options, *index["options"][command], *index["explained"]}
    for word, following in zip_longest(words, words[1:], fillvalue=""):
        option, equals, value = word.partition("=")
        if option in ("--method", "--method.class_path"):
            name = value if equals else following
            if name.isidentifier() and name not in methods:
                problem = "there is no such method"
                raise UsageError(no_such_class("--method", name, problem, methods, methods))
        if re.fullmatch(r"--\w\S*", option) and _is_unknown(option, known):
            raise UsageError(unknown_option(word, [*options, *index["options"][command]]))


def unknown_option(rest: str, options: Sequence[str]) -> str:
    """Return the message about an option that does not exist.

    Args:
        rest: The words that the parser did not accept.
        options: All options of the command.
    """
    given = next((word for word in rest.split() if word.startswith("-")), rest.split()[0])
    bare = given.split("=")[0]
    if not bare.startswith("-"):
        return f"unknown argument {bare!r}; options begin with --, and --help lists them"
    foreign = hint_for(bare)
    if foreign:
        return f"unknown option {bare}; {foreign}"
    own = [option for option in options if not option.endswith(".help")]
    hint = did_you_mean(bare, own, cutoff=_MISTYPED) or _of_another_command(bare, options)
    return f"unknown option {bare}{hint or did_you_mean(bare, own) or '; --help lists the options'}"


def no_such_class(
    option: str, name: str, problem: str, names: Sequence[str], own: Sequence[str]
) -> str:
    """Return the message about a class that cannot be used.

    Args:
        option: Where it was given.
        name: The name that was given.
        problem: The problem with it.
        names: All accepted names.
        own: Those to list, unless they are too many.
    """
    hint = did_you_mean(name, names, cutoff=0.5)
    listed = f"there are {', '.join(own)}, or " if 0 < len(own) <= MOST_NAMES else ""
    return f"{option} {name}: {problem}{hint or ';'} {listed}give the import path of your own"


def did_you_mean(given: str, names: Sequence[str], cutoff: float = 0.6) -> str:
    """Return a hint at the nearest name, by spelling in any case or by ending; empty if none."""
    lower = {name.lower(): name for name in names}
    near = difflib.get_close_matches(given.lower(), lower, n=1, cutoff=cutoff)
    near = near or [name for name in lower if name.endswith("." + given.lower().lstrip("-"))][:1]
    return f"; did you mean {lower[near[0]]}?" if near else ""


def _of_another_command(given: str, options: Sequence[str]) -> str:
    """Return a hint at an option that only other commands have; empty if none is near."""
    commands: dict[str, list[str]] = {}
    for command, names in (stored_index() or {"options": {}})["options"].items():
        for name in set(names) - set(options):
            commands.setdefault(name, []).append(command)
    near = difflib.get_close_matches(given, commands, n=1, cutoff=_MISTYPED)
    return f"; {near[0]} is an option of {' and '.join(commands[near[0]])}" if near else ""


def _is_unknown(option: str, known: set[str]) -> bool:
    """Return whether no class or mapping can have this setting, and it is not in ``known``."""
    if option.rstrip("+") in known or option in known:
        return False
    return not any(part in known and not _is_section(part, known) for part in _parents(option))


def _parents(option: str) -> Iterator[str]:
    while "." in option:
        option = option.rpartition(".")[0]
        yield option
        yield f"{option}+"


def _is_section(option: str, known: set[str]) -> bool:
    """Return whether an option only groups others, such as ``--model``."""
    return any(o.startswith(f"{option}.") and o != f"{option}.help" for o in known)
