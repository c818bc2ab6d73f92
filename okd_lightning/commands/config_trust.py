"""Trust in a config that the user did not type: a checkpoint's, or an earlier comparison's.

A config names classes to import and build, and servers to connect to, so its author can run any
program with it. Typed options are the user's own, and so is a config that the user's own runs have
signed (``checkpoints.signature``). Any other config may name only the classes of this library, its
``callbacks`` folder, lightning, torch.optim and peft. An object is judged by the module that
defines it, so that ``okd_lightning.some_module.subprocess.Popen`` is subprocess's.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import lightning
import yaml

from okd_lightning.bounded_files import load_yaml
from okd_lightning.data import RolloutDataModule
from okd_lightning.training.config_paths import user_path
from okd_lightning.training.importable_classes import (
    accepts_only_data,
    allowed_class,
    class_here,
    parameter_types,
)
from okd_lightning.training.module import DistillationModule

SECTIONS = ("seed_everything", "model", "data", "method", "trainer")
"""Sections of a run's config."""

FLAG = "--trust_checkpoint"

_CLASSES = {"model": DistillationModule, "data": RolloutDataModule, "trainer": lightning.Trainer}
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_SERVERS = ("model.engine", "trainer.model_registry")
_ADDRESSES = ("url",)
_REWARD_MODELS = ("path",)
_KEYS = ("key_variable", "token_variable")
"""Names of environment variables whose value is sent to a server."""
_MODULE_NAMES = ("megatron_core", "parent_library", "auto_map", "auto_mapping")
"""Settings of peft and transformers that are imported by name."""
_KERNELS = "_implementation"
"""transformers downloads and runs a kernel where attn_implementation names a repository."""
_PLACES = ("dirpath", "folder", "save_dir", "sync_folder")
_CACHES = ("data.token_cache",)
_UNWRITTEN = "which no run writes"
_CLASS, _SETTINGS, _MORE = "class_path", "init_args", "dict_kwargs"


@dataclass(frozen=True)
class ForeignPart:
    """A part of a config that is used only if it is trusted.

    Attributes:
        option: Place in the config, as typed, without the dashes.
        value: Value, as text.
        what: Kind of the part, for messages.
    """

    option: str
    value: str
    what: str

    @property
    def is_broken(self) -> bool:
        """True for a part that no run's config contains."""
        return self.what == _UNWRITTEN

    @property
    def setting(self) -> str:
        """The option that has to be given to replace it; the whole section for ``method``."""
        section, *rest = self.option.split(".")
        return section if section == "method" or not rest else f"{section}.{rest[0]}"

    def __str__(self) -> str:
        shown = self.value if len(self.value) <= 80 else f"{self.value[:77]}..."
        return f"--{self.option} {shown!r}, {self.what}"


def foreign_parts(config: Mapping[str, Any], given: Collection[str] = ()) -> Iterator[ForeignPart]:
    """Yield the parts of a config that are used only if it is trusted, in order.

    Args:
        config: Sections such as model, data and trainer.
        given: Texts that were typed now: class paths and addresses among them are the user's own.
    """
    walk = _Walk(frozenset(given))
    for key, value in config.items():
        yield from walk.section(str(key), value)


def add_trust_flag(parser: argparse.ArgumentParser) -> None:
    """Add the flag of every command that reads files of an earlier run."""
    parser.add_argument(
        FLAG,
        action="store_true",
        help="trust the author of the checkpoint or comparison: import the code and use the "
        "servers that it names (your own are signed, and need no flag)",
    )


def texts_in(value: Any) -> Iterator[str]:
    """Yield all texts in nested settings, including those written as YAML within a text."""
    waiting = [value]
    while waiting:
        node = waiting.pop()
        if isinstance(node, str):
            yield node
            node = _loaded(node)
        if isinstance(node, Mapping):
            waiting += [*node, *node.values()]
        elif isinstance(node, list):
            waiting += node


class _Walk:
    """Walk through a config, with the type of every value from the parameters of its class."""

    def __init__(self, given: frozenset[str]) -> None:
        self.given = given

    def section(self, name: str, value: Any) -> Iterator[ForeignPart]:
        if name not in SECTIONS:
            yield ForeignPart(name, _text(value), _UNWRITTEN)
        elif isinstance(value, Mapping) and name in _CLASSES:
            yield from self._entries(name, value, parameter_types(_CLASSES[name]))
        elif name != "seed_everything":
            yield from self.value(name, value, None)

    def value(self, option: str, value: Any, kind: Any) -> Iterator[ForeignPart]:
        """Check one value; ``kind`` is its annotation, None where that is unknown."""
        if isinstance(value, str):
            yield from self._text(option, value, kind)
            value = _loaded(value)
        if isinstance(value, list):
            for entry in value:
                yield from self.value(option, entry, kind)
        elif isinstance(value, Mapping):
            is_object = any(str(key).startswith(_CLASS) for key in value)
            if is_object:
                yield from self._object(option, value)
            else:
                yield from self._entries(option, value, parameter_types(kind))

    def _entries(
        self, option: str, entries: Mapping[str, Any], kinds: Mapping[str, Any] | None
    ) -> Iterator[ForeignPart]:
        """Check settings by name; ``kinds`` is None where they are plain data."""
        for key, value in entries.items():
            plain = str(key).removesuffix("+")
            name = f"{option}.{plain}"
            if plain.startswith(("__", "$")) or (kinds is not None and "." in plain):
                yield ForeignPart(name, _text(value), _UNWRITTEN)
                continue
            if value is not None and _text(value) not in self.given:
                yield from _named(name, plain, value)
            yield from self.value(name, value, Any if kinds is None else kinds.get(plain))

    def _object(self, option: str, entries: Mapping[str, Any]) -> Iterator[ForeignPart]:
        """Check an object to build: its class, and its settings with the types of the class."""
        path = entries.get(_CLASS)
        kind = None
        if not isinstance(path, str):
            yield ForeignPart(option, _text(path), "in place of a class path")
        elif path in self.given:
            kind = class_here(path)
        elif (kind := allowed_class(path)) is None:
            yield ForeignPart(option, path, "code that is not okd-lightning's own")
        for key, value in entries.items():
            if key not in (_CLASS, _SETTINGS, _MORE):
                yield ForeignPart(f"{option}.{key}", _text(value), _UNWRITTEN)
            elif key == _SETTINGS and isinstance(value, Mapping):
                kinds = None if kind is None else parameter_types(kind)
                yield from self._entries(option, value, kinds or {})
            elif key != _CLASS:
                yield from self.value(option, value, None)

    def _text(self, option: str, text: str, kind: Any) -> Iterator[ForeignPart]:
        """Check a text: an address, or a name that the parser would import or open as a config."""
        if text in self.given:
            return
        if _ADDRESS.match(text):
            yield ForeignPart(option, text, "the address of a server")
        elif not accepts_only_data(kind) and not _is_harmless(text):
            yield ForeignPart(option, text, "code to import, or a file to read as a config")


def _named(option: str, name: str, value: Any) -> Iterator[ForeignPart]:
    """Check a setting by its name, independent of its class."""
    text = _text(value)
    what = None
    if option in _SERVERS or name in _ADDRESSES:
        what = "a server, or an engine of its own"
    elif name in _REWARD_MODELS:
        what = "a reward model"
    elif name in _KEYS:
        what = "a key to send to a server"
    elif name in _MODULE_NAMES and value != "megatron.core":
        what = "a module to import"
    elif name == "trust_remote_code" and value is not False:
        what = "code of a repository"
    elif name.endswith(_KERNELS) and set("/:") & set(text):
        what = "a kernel to download and run"
    elif name in _PLACES or (option in _CACHES and value != "auto"):
        what = "a folder to write in"
    elif name == "filename" and (text.startswith("/") or ".." in text):
        what = "a file to write outside of the run"
    if what is not None:
        yield ForeignPart(option, text, what)


def _is_harmless(text: str) -> bool:
    """Return whether a text in place of an object is neither a path of code nor of a config."""
    if all(part.isidentifier() for part in text.split(".")) and "." in text:
        return allowed_class(text) is not None
    return not _is_file(text)


def _is_file(text: str) -> bool:
    try:
        return user_path(text).is_file()
    except (OSError, ValueError):
        return False


def _loaded(text: str) -> Any:
    """Return the value that the parser reads from a text, where that is a list or settings."""
    if not any(mark in text for mark in ":[-"):
        return None
    try:
        return load_yaml(text)
    except yaml.YAMLError:
        return None


def _text(value: Any) -> str:
    shown = value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True)
    return shown.removesuffix("...\n").strip()
