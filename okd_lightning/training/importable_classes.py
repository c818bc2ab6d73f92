"""Classes by their import paths: the classes that a config may name, and their parameters' types.

Owns the list of known packages, the resolution of a path without importing anything else, and the
restriction of a text value by its parameter's annotation.
"""

from __future__ import annotations

import collections.abc
import contextlib
import dataclasses
import datetime
import enum
import importlib
import importlib.util
import os
import sys
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from lightning.fabric.accelerators import Accelerator
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins import LayerSync, Precision
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.strategies import Strategy
from peft import PeftConfig
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

_OWN = "okd_lightning"
_SHELF = "callbacks"
_OTHERS = ("lightning", "torch.optim", "peft")
_KINDS = (
    *(Accelerator, Callback, CheckpointIO, ClusterEnvironment, LayerSync, Precision, Profiler),
    *(Strategy, CSVLogger, TensorBoardLogger, Optimizer, LRScheduler, PeftConfig),
)
"""Accepted classes of other packages: no loggers that send data, and no functions."""

_PLAIN = (str, bytes, int, float, complex, os.PathLike, datetime.timedelta, enum.Enum, type(None))
_CONTAINERS = (
    *(list, dict, tuple, set, frozenset, typing.Union, types.UnionType, typing.Annotated),
    *(collections.abc.Sequence, collections.abc.Iterable, collections.abc.Collection),
    *(collections.abc.Mapping, collections.abc.MutableMapping, collections.abc.Set),
)


def allowed_class(path: str) -> type | None:
    """Return the class of a known package that ``path`` names, by its full path or its name alone.

    Args:
        path: ``okd_lightning.callbacks.KD``, or ``KD`` for a class that is imported already.

    Returns:
        None for something that is not a class, is defined elsewhere, or is of a kind that no config
        builds. Nothing outside of the known packages is imported.
    """
    if path.isidentifier():
        found = _named_here(path)
    else:
        found = _resolved(path) if _is_known(path) else None
    if not isinstance(found, type) or not _is_known(str(found.__module__)):
        return None
    is_own = found.__module__.split(".")[0] in (_OWN, _SHELF)
    is_settings = dataclasses.is_dataclass(found) and _is_within(found.__module__, "peft")
    return found if is_own or is_settings or issubclass(found, _KINDS) else None


def class_here(path: str) -> type | None:
    """Return the class that a trusted ``path`` names, imported from anywhere; None without one."""
    found = allowed_class(path) if path.isidentifier() else _resolved(path)
    return found if isinstance(found, type) else None


def parameter_types(kind: Any) -> Mapping[str, Any] | None:
    """Return the types of a mapping's entries where the mapping is given for ``kind``.

    Args:
        kind: A class, or an annotation.

    Returns:
        Annotations by name, of a class's constructor or of the one dataclass in an annotation;
        empty where they are unknown; None where the entries are data.
    """
    if kind is not None and accepts_only_data(kind):
        return None
    classes = [] if kind is None else [k for k in leaves(kind) if isinstance(k, type)]
    if not isinstance(kind, type):
        classes = [k for k in classes if dataclasses.is_dataclass(k)]
    if len(classes) != 1:
        return {}
    built: Any = classes[0]
    for annotated in (built.__init__, built):  # a dataclass's fields are annotated on the class
        with contextlib.suppress(NameError, TypeError, AttributeError, SyntaxError):
            return typing.get_type_hints(annotated)
    return {}


def accepts_only_data(annotation: Any) -> bool:
    """Return whether a value for ``annotation`` is never imported or built: texts, numbers, Any."""
    if annotation is None:
        return False
    found = list(leaves(annotation))
    return all(leaf is Any or leaf is object or _is_plain(leaf) for leaf in found)


def leaves(annotation: Any) -> Iterator[Any]:
    """Yield the types in an annotation, without unions, containers and literals around them."""
    origin = typing.get_origin(annotation)
    if origin is Literal or annotation is Ellipsis:
        return
    if origin in _CONTAINERS:
        for part in typing.get_args(annotation):
            yield from leaves(part)
    elif annotation not in _CONTAINERS:
        yield annotation


def _is_plain(leaf: Any) -> bool:
    return isinstance(leaf, type) and issubclass(leaf, _PLAIN)


def _is_known(path: str) -> bool:
    """Return whether a path begins with a known package; ``callbacks`` only if it is our folder."""
    if _is_within(path, _SHELF):
        return _has_own_shelf()
    return any(_is_within(path, package) for package in (_OWN, *_OTHERS))


def _is_within(path: str, package: str) -> bool:
    return path.startswith(f"{package}.") or path == package


def _has_own_shelf() -> bool:
    """Return whether ``callbacks`` is the folder next to this package, not another one."""
    loaded = sys.modules.get(_SHELF)
    try:
        spec = loaded.__spec__ if loaded is not None else importlib.util.find_spec(_SHELF)
    except (ImportError, ValueError):
        return False
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    shelf = Path(__file__).parents[1].with_name(_SHELF).resolve()
    return bool(folders) and all(Path(folder).resolve() == shelf for folder in folders)


def _resolved(path: str) -> Any:
    """Return the object of an import path: an attribute of a module, or of a class in one."""
    module, _, name = path.rpartition(".")
    names = [name]
    while module:
        try:
            found = importlib.import_module(module)
        except (ImportError, TypeError, ValueError):
            module, _, name = module.rpartition(".")
            names.insert(0, name)
            continue
        for name in names:
            found = getattr(found, name, None)  # type: ignore[assignment]
        return found
    return None


def _named_here(name: str) -> Any:
    """Return a class of a known package by its name alone, if its module is imported already."""
    known = [module for path, module in sorted(sys.modules.items()) if _is_known(path)]
    found = [vars(module).get(name) for module in known if module is not None]
    return next((kind for kind in found if isinstance(kind, type)), None)
