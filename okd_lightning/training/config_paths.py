"""Paths in a run's settings: their options, ``~``, and the run's start folder.

``~`` is expanded once, before the settings are read. A relative path is relative to the folder in
which the run was started: a checkpoint names that folder, and its paths are resolved from there
when the checkpoint is used elsewhere. A hub id stays as it is.
"""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

from okd_lightning.errors import ConfigError, UsageError
from okd_lightning.training.importable_classes import allowed_class, class_here

PathKind: TypeAlias = Literal["path", "source"]
""""path": always a path; "source": an existing file or folder, or else a hub id."""

_OPTIONS: dict[str, PathKind] = {
    "model.student": "source",
    "model.teacher": "source",
    "model.tokenizer": "source",
    "data.train": "source",
    "data.val": "source",
    "data.test": "source",
    "data.predict": "source",
    "data.token_cache": "path",
    "trainer.default_root_dir": "path",
    "ckpt_path": "path",
}
_NAMES = ("folder", "dirpath", "save_dir", "sync_folder")
"""Parameters of classes in the settings that are paths, besides those annotated as ``Path``."""

_SOURCES = ("teacher_base", "path")
"""Parameters of classes in the settings that name a model, besides those annotated as such."""

_KEYWORDS = {"data.token_cache": ("auto",), "ckpt_path": ("last", "best", "hpc", "registry")}

Find: TypeAlias = Callable[[str], type | None]

Change: TypeAlias = Callable[[str, str, PathKind], str]
"""Function from an option's name, its value and its kind to the new value."""


def user_path(text: str | Path) -> Path:
    """Return a user's path with ``~`` expanded."""
    return Path(text).expanduser()


def output_folder(text: str | Path, option: str) -> Path:
    """Return a user's path of a folder to write.

    Raises:
        UsageError: The path is empty or contains a zero byte.
    """
    name = str(text)
    if not name.strip() or "\0" in name:
        raise UsageError(f"{option} {name!r}: expected the name of a folder to write")
    return user_path(name)


def expand_home(config: Any) -> None:
    """Expand ``~`` in all options of ``config`` that are paths, in place.

    Args:
        config: Sections such as model, data and trainer: mappings or namespaces.
    """
    _change(config, lambda name, value, kind: os.path.expanduser(value), class_here)


def without_paths(config: Any) -> Any:
    """Return a copy of settings in which all paths are empty, to compare processes."""
    found = copy.deepcopy(config)
    _change(found, lambda name, value, kind: "", class_here)
    return found


def relocate(config: Any, start: str | None, checkpoint: str, find: Find = allowed_class) -> None:
    """Resolve the relative paths of a checkpoint's config from its run's start folder.

    Nothing changes in that folder itself, nor where it no longer exists (a moved project): paths
    are then relative to the current folder.

    Args:
        config: The checkpoint's sections; changed in place.
        start: The start folder; None in an older checkpoint.
        checkpoint: For messages.
        find: Returns the class that a path names; None for one that must not be imported.

    Raises:
        ConfigError: A hub id of the config is the name of a folder here.
    """
    if start is None or not Path(start).is_dir() or Path(start).samefile(Path.cwd()):
        return

    def resolved(name: str, value: str, kind: PathKind) -> str:
        there = Path(start, value)
        if kind == "path" or there.exists():
            return str(there)
        if Path(value).exists() and not Path(value).is_absolute():
            raise ConfigError(
                f"--{name} {value!r} of {checkpoint} was not a path in {start}, where its run was "
                f"started, and is one here: give --{name}, or work in another folder"
            )
        return value

    _change(config, resolved, find)


def _change(config: Any, change: Change, find: Find) -> None:
    for section, node in list(_items(config).items()):
        if isinstance(node, str) and section in _OPTIONS:
            _items(config)[section] = _changed(section, node, _OPTIONS[section], change)
        else:
            _walk(section, node, None, change, find)


def _walk(name: str, node: Any, owner: Any, change: Change, find: Find) -> None:
    """Change the paths below one option; ``owner`` is the class that takes its values."""
    if isinstance(node, list):
        for entry in node:
            _walk(name, entry, None, change, find)
        return
    items = _items(node)
    if "class_path" in items:
        built = find(str(items["class_path"]))
        _walk(name, items.get("init_args"), built, change, find)
        return
    for key, value in list(items.items()):
        option = f"{name}.{key}"
        kind = _OPTIONS.get(option) or _kind(owner, key)
        if isinstance(value, str) and kind is not None:
            items[key] = _changed(option, value, kind, change)
        elif kind is not None and (several := _several(value)):
            for place, entry in several.items():
                if isinstance(entry, str):
                    value[place] = _changed(option, entry, kind, change)
                else:
                    _walk(option, entry, None, change, find)
        elif not isinstance(value, str):
            _walk(option, value, None, change, find)


def _several(value: Any) -> dict[Any, Any]:
    """Return the entries of a parameter that takes several sources, by place; {} for any other."""
    if isinstance(value, list):
        return dict(enumerate(value))
    is_one = isinstance(value, Mapping) and {"model_type", "class_path"} & value.keys()
    return dict(value) if isinstance(value, dict) and not is_one else {}


def _changed(name: str, value: str, kind: PathKind, change: Change) -> str:
    is_path = value and value not in _KEYWORDS.get(name, ()) and "://" not in value
    return change(name, value, kind) if is_path else value


def _kind(owner: Any, name: str) -> PathKind | None:
    """Return what a class's parameter names, if it is a path."""
    parameter = None if owner is None else inspect.signature(owner).parameters.get(name)
    if parameter is None:
        return None
    if name in _SOURCES or "ModelArgument" in str(parameter.annotation):
        return "source"
    return "path" if name in _NAMES or "Path" in str(parameter.annotation) else None


def _items(node: Any) -> dict[str, Any]:
    if isinstance(node, Mapping):
        return node  # type: ignore[return-value]
    return vars(node) if type(node).__name__ == "Namespace" else {}
