"""Options that the user gave, by layer: a checkpoint's config, config files, the command line.

A parsed configuration does not distinguish a given value from a default. The difference counts
where two options set one quantity, or an option has no effect in a run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from okd_lightning.bounded_files import load_yaml, read_text
from okd_lightning.errors import ConfigError

Layer: TypeAlias = dict[str, Any]
"""Option, as typed (model.optimizer.lr) → its value."""

_SECTIONS = ("model", "data", "trainer", "method")


def layers(arguments: Sequence[str]) -> list[Layer]:
    """Return the options of every config and, last, of the command line.

    Args:
        arguments: As the parser takes them: options after a command, configs as YAML text.
    """
    found: list[Layer] = []
    typed: Layer = {}
    for option, text in options_of(arguments):
        value = parsed(text)
        if option == "config":
            found.append(flattened(value) if isinstance(value, Mapping) else {})
            continue
        if option in _SECTIONS and isinstance(value, str) and Path(value).is_file():
            value = parsed(read_text(Path(value), ConfigError, f"--{option} {value!r}"))
        typed |= flattened({option: value})
    return [*found, typed]


def options_of(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """Return the typed options without their dashes, each with its text."""
    found = []
    for i, word in enumerate(arguments):
        if not word.startswith("--"):
            continue
        option, equals, value = word[2:].partition("=")
        follows = arguments[i + 1] if i + 1 < len(arguments) else ""
        found.append((option, value if equals else follows))
    return found


def flattened(config: Mapping[str, Any], prefix: str = "") -> Layer:
    """Return nested settings under the typed option names: without class_path and init_args."""
    found: Layer = {}
    for key, value in config.items():
        if key == "class_path":
            found[prefix] = value
            continue
        part = "" if key == "init_args" else str(key).replace(".init_args", "")
        name = ".".join(filter(None, (prefix, part)))
        if isinstance(value, Mapping) and value:
            found |= flattened(value, name)
        else:
            found[name] = value
    return found


def parsed(text: str) -> Any:
    """Return a typed value as YAML reads it; the text where it is not YAML."""
    try:
        return load_yaml(text)
    except yaml.YAMLError:
        return text
