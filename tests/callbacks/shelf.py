"""Loader of the shelf's plug-ins, which are not installed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "callbacks"
FILES = sorted(FOLDER.glob("*.py"))


def load(path: Path):
    """The module of a file; each is executed once."""
    name = f"shelf_{path.stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
    return sys.modules[name]


def method(name: str, **settings):
    """A method by its file and class, as in ``vopd.VOPD``."""
    file, _, kind = name.partition(".")
    return getattr(load(FOLDER / f"{file}.py"), kind)(**settings)
