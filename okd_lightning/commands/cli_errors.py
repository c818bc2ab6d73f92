"""Error messages of the command line: one line with the problem and the remedy.

jsonargparse's messages name parser keys, Python types and every alternative of a union, nested as
deeply as the setting. A user needs the option, the given value, and the nearest valid name. Owns
the explanation of such messages; ``complaints`` parses them, and other modules refuse options.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jsonargparse

from okd_lightning.callbacks.methods.base import Method
from okd_lightning.commands.complaints import (
    Complaint,
    bare,
    complaints_of,
    imported,
    worth_saying,
)
from okd_lightning.commands.foreign_options import hint_for
from okd_lightning.commands.unknown_options import (
    MOST_NAMES,
    did_you_mean,
    no_such_class,
    unknown_option,
)
from okd_lightning.errors import ConfigError, OKDLightningError, UsageError, one_line

_MISSING = re.compile(r"the following arguments are required: (.+)")
_UNKNOWN = re.compile(r"unrecognized arguments: (.+)", re.IGNORECASE)
_NO_VALUE = re.compile(r"argument (--\S+): expected one argument")
_NOT_A_KEY = re.compile(r"Subcommand '\w+' does not accept option '([^']+)'")


_NOT_ACCEPTED = re.compile(r"Option '([^']+)' is not accepted(?:.*class_path='([^']+)')?")
_NO_IMPORT = re.compile(r"Expected a dot import path string:\s*(.*)")
_NO_MODULE = re.compile(r"No module named|has no attribute|Unable to|cannot import")
_TYPE = re.compile(r"Expected an? (?:<class '([\w.]+)'>|([\w.]+))(?:\. Got value: ?(.*))?$")
_INT = re.compile(r"invalid literal for int\(\) with base 10: '(.*)'$")
_ABSTRACT = re.compile(r"an instantiatable class, but ([\w.]+) is abstract")
_LITERAL = re.compile(r"Expected a typing\.Literal\[(.*)\](?:\. Got value: ?(.*))?$")

_MISTYPED = 0.85
"""Similarity to one of our options from which a name is taken for a misspelling of it."""

_KINDS = {
    "Method": "method",
    "DistillationCallback": "method",
    "Divergence": "divergence",
    "Callback": "callback",
    "PeftConfig": "adapter",
    "Optimizer": "optimizer",
    "Tool": "tool",
    "RewardFunction": "reward",
    "Advantage": "advantage",
    "EngineSource": "engine",
    "Teacher": "teacher",
}
_TYPE_NAMES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
}


def parse(
    parser: jsonargparse.ArgumentParser, arguments: Any, options: Sequence[str]
) -> jsonargparse.Namespace:
    """Parse arguments.

    Args:
        parser: Made with ``exit_on_error=False``.
        arguments: The words to parse.
        options: All option strings, for the nearest one.

    Raises:
        UsageError: The arguments cannot be parsed; the message is one readable line.
    """
    try:
        return parser.parse_args(arguments)
    except jsonargparse.ArgumentError as error:
        raise UsageError(readable(error, options)) from error


@contextmanager
def readable_constructors() -> Iterator[None]:
    """Turn a constructor's TypeError or ValueError into a ConfigError with the same message.

    Raises:
        ConfigError: Around a TypeError or ValueError of the block.
    """
    try:
        yield
    except (TypeError, ValueError) as error:
        if isinstance(error, OKDLightningError):
            raise
        raise ConfigError(readable(error)) from error


def instantiate(
    parser: jsonargparse.ArgumentParser, options: jsonargparse.Namespace
) -> jsonargparse.Namespace:
    """Return the parsed options with their objects built.

    Raises:
        ConfigError: A constructor refused its settings.
    """
    with readable_constructors():
        # jsonargparse 4.49 renamed instantiate_classes to instantiate
        build = getattr(parser, "instantiate", None) or parser.instantiate_classes
        return build(options)


def readable(error: Exception, options: Sequence[str] = ()) -> str:
    """Return the message of a parser's or constructor's error, on one line.

    Args:
        error: The exception.
        options: All options of the command, for the nearest one.
    """
    text = str(error)
    missing = _what_is_missing(text)
    if missing:
        return f"{missing} must be given (on the command line, or in a --config file)"
    no_value = _NO_VALUE.search(text)
    if no_value:
        return f"{no_value.group(1)} needs a value after it"
    unknown = _UNKNOWN.search(text)
    if unknown:
        return unknown_option(unknown.group(1), options)
    not_a_key = _NOT_A_KEY.search(text)
    if not_a_key:
        key = not_a_key.group(1)
        foreign = hint_for(key)
        if foreign:
            return f"unknown setting {key!r} in the configuration; {foreign}"
        hint = did_you_mean(key, [option.removeprefix("--") for option in options])
        return f"unknown setting {key!r} in the configuration{hint or '; --help lists all'}"
    return _explain(worth_saying(list(complaints_of(text)))) or one_line(str(error))


def _what_is_missing(text: str) -> str | None:
    """Return the required options that were not given, as typed."""
    for complaint in complaints_of(text):
        found = _MISSING.search(complaint.text)
        if found:
            prefix = f"{complaint.option}." if complaint.keys else "--"
            return " and ".join(prefix + bare(name.strip()) for name in found.group(1).split(","))
    return None


def subclass_names(base: type, within: str = "") -> list[str]:
    """Return the names of imported, concrete subclasses of ``base`` in modules of ``within``."""
    found, waiting = set(), [base]
    while waiting:
        kind = waiting.pop()
        waiting += kind.__subclasses__()
        is_meant = kind.__module__.startswith(within) and not kind.__name__.startswith("_")
        if is_meant and not inspect.isabstract(kind):
            found.add(kind.__name__)
    return sorted(found)


def method_names() -> list[str]:
    """Return the class names of the imported methods."""
    return subclass_names(Method)


def _explain(complaints: Sequence[Complaint]) -> str | None:
    if not complaints:
        return None
    for complaint in complaints:
        for explain in (_not_accepted, _settings_without_class, _no_such_class, _not_importable):
            explained = explain(complaint)
            if explained:
                return explained
    first = complaints[0]
    prefix = f"{first.option}: " if first.keys else ""
    explained = _wrong_type(complaints) or _not_settings(first) or " ".join(first.text.split())
    return prefix + explained


def _not_accepted(complaint: Complaint) -> str | None:
    found = _NOT_ACCEPTED.search(complaint.text)
    if not found:
        return None
    option, path = found.group(1), found.group(2) or complaint.class_path
    name = (path or "it").rsplit(".", 1)[-1]
    accepted = _parameters_of(path)
    foreign = hint_for(".".join([*map(bare, complaint.keys), option]))
    own = did_you_mean(option, accepted, cutoff=_MISTYPED if foreign else 0.6)
    hint = own if own or not foreign else f"; {foreign}"
    is_worth_listing = accepted and not (hint and len(accepted) > MOST_NAMES)
    known = f" (it takes {', '.join(accepted)})" if is_worth_listing else ""
    return f"{name} has no setting {option!r}{hint}{known}"


def _settings_without_class(complaint: Complaint) -> str | None:
    """Explain settings whose class is not named and has no default."""
    found = _ABSTRACT.search(complaint.text)
    kind = imported(found.group(1)) if found else None
    if not isinstance(kind, type):
        return None
    option, names = complaint.option, subclass_names(kind, within="okd_lightning.")
    shown = f"one of {', '.join(names)}" if 0 < len(names) <= MOST_NAMES else "the import path"
    return f"{option}: its settings need a class, and none is named; give {option} {shown} as well"


def _no_such_class(complaint: Complaint) -> str | None:
    found = _NO_IMPORT.search(complaint.text)
    is_abstract = "but is abstract" in complaint.text
    base = _base_class(complaint.base)
    if base is None or base.__name__ not in _KINDS or not (found or is_abstract):
        return None
    name = found.group(1).strip() if found else str(complaint.given)
    names = subclass_names(base)
    own = subclass_names(base, within="okd_lightning.") if len(names) > MOST_NAMES else names
    problem = "is abstract" if is_abstract else f"there is no such {_KINDS[base.__name__]}"
    return no_such_class(complaint.option, name, problem, names, own)


def _not_importable(complaint: Complaint) -> str | None:
    if complaint.class_path is None or not _NO_MODULE.search(complaint.text):
        return None
    reason = " ".join(complaint.text.split())
    package, *_ = complaint.class_path.split(".")
    shelf = (
        "; the files of callbacks/ are in a checkout of okd-lightning and not in the installed "
        "package: run this in a checkout, or copy the method's file into ./callbacks/"
    )
    return (
        f"{complaint.option} {complaint.class_path}: cannot be imported ({reason}); modules are "
        f"looked for among the installed ones and in the current folder"
        f"{shelf if package == 'callbacks' else ''}"
    )


def _wrong_type(complaints: Sequence[Complaint]) -> str | None:
    """Return all types of a union in one sentence."""
    expected: list[str] = []
    given = None
    for complaint in complaints:
        literal, kind = _LITERAL.search(complaint.text), _TYPE.search(complaint.text)
        if whole := _INT.search(complaint.text):
            expected.append(_TYPE_NAMES["int"])
            given = whole.group(1)
        elif literal:
            choices = [c.strip().strip("'") for c in literal.group(1).split(",")]
            expected += [c for c in choices if c not in expected]
            given = _first(literal.group(2), complaint.given, given)
        elif kind:
            name = (kind.group(1) or kind.group(2)).removeprefix("builtins.")
            expected.append(_TYPE_NAMES.get(name, name))
            given = _first(kind.group(3), complaint.given, given)
    if not expected:
        return None
    return f"expected {' or '.join(dict.fromkeys(expected))}, got {given!r}"


def _first(*texts: str | None) -> str | None:
    """Return the first text that is known, an empty one included."""
    return next((text for text in texts if text is not None), None)


def _not_settings(complaint: Complaint) -> str | None:
    """Explain a name where settings of a known class, or one of its subclasses, are expected."""
    base = _base_class(complaint.base)
    if base is None or not _NO_IMPORT.search(complaint.text):
        return None
    names = list(inspect.signature(base).parameters)
    if not names:
        known = "".join(f"{name}, " for name in subclass_names(base))
        return f"expected {known}or the import path of your own, got {complaint.given!r}"
    return f"expected settings ({complaint.option}.{names[0]}, ...), got {complaint.given!r}"


def _base_class(subtypes: str | None) -> type | None:
    """Return the class in a union: the last of its types that is not None."""
    paths = re.findall(r"[A-Za-z_][\w]*(?:\.[\w]+)+", (subtypes or "").replace("typing.", ""))
    found = [kind for path in paths if isinstance(kind := imported(path), type)]
    return found[-1] if found else None


def _parameters_of(class_path: str | None) -> list[str]:
    kind = imported(class_path) if class_path else None
    if kind is None:
        return []
    names = inspect.signature(kind).parameters
    return [name for name in names if name not in ("self", "params")]
