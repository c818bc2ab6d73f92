"""Sharded checkpoints on disk: a folder of tensor parts, and one file of everything else.

Owns the names in it and reading it in one process; ``folder_index`` reads the index of the parts.
"""

from __future__ import annotations

import pickle
import shutil
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from okd_lightning.checkpoints.folder_index import ShardReader, load_shards
from okd_lightning.checkpoints.integrity import damage_of
from okd_lightning.durable_files import sync_folder
from okd_lightning.errors import CheckpointError

REST = "meta.pt"
"""File of everything but the tensors of models and optimizers."""

SHARED = "shared_weights"
"""Key in ``REST``: further names of shared weights, each with the name that is written."""

WEIGHTS, OPTIMIZER = "state_dict", "optimizer"
"""Prefixes of the tensors' keys."""


def flat_key(*parts: str) -> str:
    """Join the parts of a tensor's key."""
    return ".".join(parts)


def is_checkpoint_folder(path: Path) -> bool:
    """Return whether a path is a folder that holds a sharded checkpoint."""
    return (path / REST).is_file()


def beside(path: Path, kind: Literal["new", "old"]) -> Path:
    """Return the path of a folder being written ("new"), or of a replaced one ("old")."""
    return path.parent / f"{path.name}.{kind}"  # also of "." and "/", which have no name


def settled(path: Path) -> Path:
    """Return the path of the whole checkpoint: another one if a process ended between two renames.

    A whole folder has its ``REST``, which is written last. A file (of an unsharded run) at the
    "old" path is whole.
    """
    old = beside(path, "old")
    found = [p for p in (path, beside(path, "new"), old) if is_checkpoint_folder(p)]
    found += [old] if old.is_file() else []
    return path if path.exists() or not found else found[0]


def make_room(path: Path) -> Path:
    """Prepare for a new folder ``path``: rename a whole one to ``path``, remove half-written ones.

    Returns:
        An empty folder to write in, for ``put_in_place``.
    """
    found = settled(path)
    if found != path:
        found.rename(path)
    new = beside(path, "new")
    _remove(new)
    new.mkdir(parents=True)
    return new


def put_in_place(new: Path, path: Path) -> None:
    """Replace ``path``, be it a file, a folder or missing, by ``new`` in two renames.

    At every moment one whole checkpoint exists, which ``settled`` finds.
    """
    old = beside(path, "old")
    _remove(old)
    if path.exists():
        path.rename(old)
    new.rename(path)
    sync_folder(path.parent)
    _remove(old)


def tensors_in(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of a checkpoint folder by key, without their data (on ``meta``).

    Raises:
        CheckpointError: The index is missing, broken, or of something other than tensors.
    """
    index = ShardReader(folder).read_metadata().state_dict_metadata
    return {
        key: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
        for key, entry in index.items()
        if isinstance(entry, TensorStorageMetadata)  # all of them
    }


def weights_in(folder: Path) -> dict[str, Tensor]:
    """Return the models' weights of a checkpoint folder by name, without data (on ``meta``)."""
    prefix = flat_key(WEIGHTS, "")
    found = tensors_in(folder)
    weights = {key[len(prefix) :]: v for key, v in found.items() if key.startswith(prefix)}
    return _with_shared(folder, weights)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Return the models' weights, assembled in this one process, without optimizer states."""
    return _with_shared(folder, _read(folder, flat_key(WEIGHTS, "")))


def read_rest(folder: Path) -> dict[str, Any]:
    """Read everything but the tensors, weights-only.

    Raises:
        CheckpointError: The file is broken or damaged, or holds more than plain values.
    """
    require_sound(folder / REST, folder)
    try:
        rest = torch.load(folder / REST, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"--ckpt_path {str(folder)!r}: {REST} is broken, or holds more than tensors and plain "
            "values: no checkpoint of okd-lightning"
        ) from error
    assert isinstance(rest, dict)
    return rest


def require_sound(file: Path, given: str | Path) -> None:
    """Compare a file with its checksums, once as long as it does not change.

    Raises:
        CheckpointError: The file is damaged.
    """
    if (damage := damage_of(file)) is not None:
        others = sorted(str(p) for p in Path(given).parent.glob("*.ckpt") if p != Path(given))
        advice = f"; there are {', '.join(others[:5])}" if others else ""
        raise CheckpointError(
            f"--ckpt_path {str(given)!r} is damaged ({damage}): not what was written, by a fault "
            f"of the disk or of a copy; take another checkpoint{advice}"
        )


def read_whole(folder: Path) -> dict[str, Any]:
    """Read a checkpoint folder as an unsharded checkpoint, from which any strategy can resume."""
    checkpoint = read_rest(folder)
    for number, state in enumerate(checkpoint.get("optimizer_states", ())):
        state["state"] = {}
        for key, value in _read(folder, flat_key(OPTIMIZER, str(number), "")).items():
            index, name = key.split(".", 1)
            state["state"].setdefault(int(index), {})[name] = value
    return {**checkpoint, "state_dict": read_weights(folder)}


class FolderReadingIO(TorchCheckpointIO):
    """Lightning's file access that also resumes from a checkpoint folder."""

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load a file as Lightning does, or an assembled folder; weights-only by default.

        Raises:
            CheckpointError: The file is damaged.
        """
        folder = settled(Path(path))
        if is_checkpoint_folder(folder):
            return read_whole(folder)
        if folder.is_file():
            require_sound(folder, path)
        if not args and kwargs.get("weights_only") is None:  # Lightning: False for a URL
            kwargs["weights_only"] = True
        checkpoint: dict[str, Any] = super().load_checkpoint(path, *args, **kwargs)
        return checkpoint


def _with_shared(folder: Path, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add the further names of tensors that several names share: they are written under one."""
    names = read_rest(folder).get(SHARED, {})
    return weights | {name: weights[first] for name, first in names.items()}


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _read(folder: Path, prefix: str) -> dict[str, Tensor]:
    """Read the tensors whose keys begin with ``prefix``, which is cut off, in this one process."""
    state = {
        key: torch.empty_like(value, device="cpu")
        for key, value in tensors_in(folder).items()
        if key.startswith(prefix)
    }
    with warnings.catch_warnings():  # "assuming the intent is to load in a single process": it is
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load_shards(state, folder, no_dist=True)
    return {key[len(prefix) :]: value for key, value in state.items()}
