"""Arguments that may be an object, a class, or a class's name."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterator
from typing import Any

from okd_lightning.errors import ConfigError


def as_object(given: object, base: type[Any], option: str, example: str) -> Any:
    """Return an object of ``base``: the argument, or an instance of the class that it names.

    Args:
        given: The argument.
        base: The required class.
        option: The argument's name, for messages.
        example: An object as one would write it, for messages.

    Raises:
        ConfigError: The argument is not an object or class of ``base``, an unknown name, or a class
            that needs arguments.
    """
    if isinstance(given, str):
        given = _named(given, base, option)
    if isinstance(given, type) and issubclass(given, base):
        given = _constructed(given, base, option)
    if not isinstance(given, base):
        raise ConfigError(f"{option} is {given!r}; expected {_a(base)} object, such as {example}")
    return given


def _named(name: str, base: type[Any], option: str) -> type[Any]:
    known = {kind.__name__: kind for kind in _concrete(base)}
    if name in known:
        return known[name]
    folded = {n.lower(): n for n in known}
    near = difflib.get_close_matches(name.lower().replace("_", ""), folded, 1, 0.6)
    hint = f"did you mean {folded[near[0]]}? " if near else ""
    raise ConfigError(
        f"{option} is {name!r}; expected {_a(base)} object, or the name of one: {hint}known are "
        f"{', '.join(sorted(known))}"
    )


def _a(kind: type[Any]) -> str:
    return f"{'an' if kind.__name__[0] in 'AEIOU' else 'a'} {kind.__name__}"


def _constructed(kind: type[Any], base: type[Any], option: str) -> Any:
    if inspect.isabstract(kind):
        raise ConfigError(
            f"{option} is the abstract class {kind.__name__}; expected an object of one of "
            f"{', '.join(sorted(k.__name__ for k in _concrete(base)))}"
        )
    needed = [
        parameter.name
        for parameter in inspect.signature(kind).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if needed:
        arguments = ", ".join(f"{name}=..." for name in needed)
        raise ConfigError(
            f"{option} is {kind.__name__}, which needs arguments: give {kind.__name__}({arguments})"
        )
    return kind()


def _concrete(base: type[Any]) -> Iterator[type[Any]]:
    for kind in base.__subclasses__():
        if not inspect.isabstract(kind) and not kind.__name__.startswith("_"):
            yield kind
        yield from _concrete(kind)
