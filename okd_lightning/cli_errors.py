"""One formatter: whatever went wrong on the command line, as one line that says what to do.

jsonargparse's messages name parser keys, Python types and every alternative of a union; what a
person needs is the option, what was given, and the nearest thing that exists.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jsonargparse

from okd_lightning.callbacks import DistillationCallback
from okd_lightning.errors import ConfigError, OKDLightningError, UsageError

_MISSING = re.compile(r"the following arguments are required: (.+)")
_UNKNOWN = re.compile(r"unrecognized arguments: (.+)", re.IGNORECASE)
_KEY = re.compile(r'Parser key "([^"]+)":?\s*')
_BAD_OPTION = re.compile(r"class_path '([\w.]+)': Option '([^']+)' is not accepted")
_BAD_PATH = re.compile(r"Expected a dot import path string: (\S+)|Import path '?([\w.]+)'? not")
_BAD_TYPE = re.compile(r"Expected a (?:<class '([\w.]+)'>|(\S+))\. Got value: (.*)")


def parse(
    parser: jsonargparse.ArgumentParser, arguments: Any, options: Sequence[str]
) -> jsonargparse.Namespace:
    """Parse arguments.

    Args:
        parser: Made with ``exit_on_error=False``.
        arguments: What to parse.
        options: All option strings, for the nearest one.

    Raises:
        UsageError: They cannot be parsed; one readable line.
    """
    try:
        return parser.parse_args(arguments)
    except jsonargparse.ArgumentError as error:
        raise UsageError(readable(error, options)) from error


@contextmanager
def readable_constructors() -> Iterator[None]:
    """What a constructor refuses becomes a ConfigError, in its own words.

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
    """The parsed options with their objects built.

    Raises:
        ConfigError: A constructor refused its settings.
    """
    with readable_constructors():
        build = getattr(parser, "instantiate", None) or parser.instantiate_classes
        return build(options)


def readable(error: Exception, options: Sequence[str] = ()) -> str:
    """The message of an error, on one line.

    Args:
        error: From the parser, a constructor or the run.
        options: All options of the command, for the nearest one.
    """
    text = str(error)
    for explain in (_missing, _not_accepted, _unknown_method):
        explained = explain(text)
        if explained:
            return explained
    unknown = _UNKNOWN.search(text)
    if unknown:
        return _unknown_option(unknown.group(1), options)
    key = _KEY.search(text)
    text = _KEY.sub("", text)
    text = _first_of_union(text)
    bad_type = _BAD_TYPE.search(text)
    if bad_type:
        kind = (bad_type.group(1) or bad_type.group(2)).removeprefix("builtins.")
        text = f"expected {kind}, got {bad_type.group(3)!r}"
    line = " ".join(text.split())
    return f"--{_bare(key.group(1))}: {line}" if key else line


def method_names() -> list[str]:
    """The methods that are imported, by class name."""
    found, waiting = set(), [DistillationCallback]
    while waiting:
        kind = waiting.pop()
        waiting += kind.__subclasses__()
        if not inspect.isabstract(kind):
            found.add(kind.__name__)
    return sorted(found)


def _missing(text: str) -> str | None:
    found = _MISSING.search(text)
    if not found:
        return None
    names = " and ".join(f"--{_bare(name.strip())}" for name in found.group(1).split(","))
    return f"{names} must be given (on the command line, or in a --config file)"


def _not_accepted(text: str) -> str | None:
    found = _BAD_OPTION.search(text)
    if not found:
        return None
    path, option = found.groups()
    name = path.rsplit(".", 1)[-1]
    accepted = _parameters_of(name)
    near = difflib.get_close_matches(option, accepted, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    known = f" (it takes {', '.join(accepted)})" if accepted else ""
    return f"{name} has no setting {option!r}{hint}{known}"


def _unknown_method(text: str) -> str | None:
    if "callbacks.base.DistillationCallback" not in text:
        return None
    found = _BAD_PATH.search(text)
    if not found:
        return None
    name = found.group(1) or found.group(2)
    near = difflib.get_close_matches(name, method_names(), n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}? " if near else ""
    return (
        f"--method {name}: there is no such method; {hint}methods are {', '.join(method_names())}, "
        "or the import path of your own"
    )


def _unknown_option(rest: str, options: Sequence[str]) -> str:
    given = next((word for word in rest.split() if word.startswith("-")), rest.split()[0])
    bare = given.split("=")[0]
    near = difflib.get_close_matches(bare, options, n=1)
    hint = f"; did you mean {near[0]}?" if near else "; --help lists the options"
    return f"unknown option {bare}{hint}"


def _first_of_union(text: str) -> str:
    """The first real complaint among a union's, which lists one line a member."""
    if "Union subtypes" not in text:
        return text
    complaints = text.split("Errors:", 1)[-1].split("Given value type:")[0].split("\n  - ")
    real = [part.strip() for part in complaints if part.strip() and "NoneType" not in part]
    return real[0] if real else text


def _parameters_of(class_name: str) -> list[str]:
    waiting: list[type] = [DistillationCallback]
    while waiting:
        kind = waiting.pop()
        if kind.__name__ == class_name:
            return [name for name in inspect.signature(kind).parameters if name != "self"]
        waiting += kind.__subclasses__()
    return []


def _bare(key: str) -> str:
    """A parser key without its subcommand."""
    return re.sub(r"^(fit|validate|test|predict)\.", "", key)
