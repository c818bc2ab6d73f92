"""Entries of ``--methods``: a method with its defaults, or a YAML file that configures one."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from okd_lightning.commands.cli_arguments import class_name, load_config
from okd_lightning.commands.cli_errors import method_names
from okd_lightning.errors import ConfigError, UsageError

_SECTIONS = ("method", "model", "data", "trainer")
_SAME_FOR_ALL = ("student", "teacher", "tokenizer")  # of the model
_OWN_DATA = (
    "batch_size",
    "global_batch_size",
    "prompts_per_epoch",
    "prompts_per_rollout",
    "rollout_lag",
    "samples_per_prompt",
    "sampling",
    "teacher_prompt_column",
    "teacher_prompt_template",
    "max_teacher_prompt_length",
    "teacher_column",
)
"""Data settings of a method's training; all others determine the measured rows."""


_LABEL = re.compile(r"\w[\w .+@=-]*")


def checked_label(label: object, where: str) -> str:
    """Return a contender's label, which is part of a folder's name.

    Raises:
        ConfigError: The label could name another folder, or contains a line break.
    """
    if not isinstance(label, str) or not _LABEL.fullmatch(label) or len(label) > 100:
        raise ConfigError(
            f"{where}: a contender cannot be called {label!r}; expected letters, digits and "
            "spaces and ._+@=- with a letter, digit or _ first: rename its file"
        )
    return label


def checked_seed(seed: object, where: str) -> int:
    """Return a seed: an integer from 0 to 2**32 - 1.

    Raises:
        ConfigError: Anything else.
    """
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**32:
        raise ConfigError(
            f"{where}: expected whole numbers from 0 to 4294967295 as seeds, got {seed!r}"
        )
    return seed


@dataclass(frozen=True)
class Entry:
    """One contender.

    Attributes:
        label: Name in tables and folders.
        config: Settings of its own runs: ``method``, ``trainer.callbacks+``, ``model``, ``data``.
    """

    label: str
    config: Mapping[str, Any]


def read_entries(names: str) -> list[Entry]:
    """Return the contenders of a comma-separated list.

    Args:
        names: Classes (``KD``), import paths (``callbacks.minillm.MiniLLM``) and YAML files.

    Raises:
        UsageError: An empty list, or one contender twice.
        ConfigError: An unknown method, or a file that configures something other than a method.
    """
    found = [_read_entry(name.strip()) for name in names.split(",") if name.strip()]
    if not found:
        raise UsageError("--methods names no method; give some, such as --methods KD,GKD,OKD")
    labels = [entry.label for entry in found]
    for label in labels:
        if labels.count(label) > 1:
            raise UsageError(
                f"--methods has two contenders called {label}; give each once, and different "
                "settings of one method in files of different names"
            )
    return found


def own_method(config: Mapping[str, Any]) -> str | None:
    """Return the method of a config's own ``method`` section, which a comparison replaces."""
    return class_name(config.get("method"))


def _read_entry(name: str) -> Entry:
    if name.endswith((".yaml", ".yml")) or Path(name).is_file():
        label = checked_label(Path(name).stem, f"--methods {name}")
        return Entry(label, checked_settings(f"--methods {name}", load_config(name)))
    known = method_names()
    if "." not in name and name not in known:
        near = difflib.get_close_matches(name.lower(), [n.lower() for n in known], n=1)
        hint = next((f"did you mean {n}? " for n in known if near and n.lower() == near[0]), "")
        raise ConfigError(
            f"--methods {name}: there is no such method; {hint}there are {', '.join(known)}, the "
            "import path of your own, or a YAML file with a method: section"
        )
    return Entry(name.rsplit(".", 1)[-1], {"method": name})


def checked_settings(where: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a contender's config; refuse settings that all contenders share.

    Raises:
        ConfigError: The config sets more, or no method.
    """
    trainer = dict(config.get("trainer") or {})
    callbacks = [*(trainer.pop("callbacks", None) or []), *(trainer.pop("callbacks+", None) or [])]
    other = [key for key in config if key not in _SECTIONS]
    other += [f"trainer.{key}" for key in trainer]
    other += [f"model.{key}" for key in _SAME_FOR_ALL if key in (config.get("model") or {})]
    other += [f"data.{key}" for key in config.get("data") or {} if key not in _OWN_DATA]
    if other:
        raise ConfigError(
            f"{where}: sets {', '.join(other)}, which all contenders of a comparison "
            "share; give that on the command line, and in this file a method: section, "
            f"trainer.callbacks, other settings of model:, and of data: {', '.join(_OWN_DATA)}"
        )
    if config.get("method") is None and not callbacks:
        raise ConfigError(
            f"{where}: sets up no method; give it a method: section or trainer.callbacks"
        )
    own = {key: config[key] for key in ("method", "model", "data") if config.get(key) is not None}
    return own | ({"trainer": {"callbacks+": callbacks}} if callbacks else {})
