"""Sharded checkpoints as they lie on disk: a folder of tensor parts, and one file of the rest.

Owns the names in it and reading it in one process; ``folder_index`` reads the index of the parts.
"""

from __future__ import annotations

import pickle
import shutil
import warnings
from pathlib import Path
from typing import Any, Literal

import lightning
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from okd_lightning.checkpoints.folder_index import ShardReader, load_shards
from okd_lightning.checkpoints.integrity import damage_of
from okd_lightning.durable_files import sync_folder
from okd_lightning.errors import CheckpointError

REST = "meta.pt"
"""Everything but tensors of models and optimizers."""

SHARED = "shared_weights"
"""In the rest: further names of weights, each with the name under which it is written."""

WEIGHTS, OPTIMIZER = "state_dict", "optimizer"
"""How the tensors' keys begin."""


def flat_key(*parts: str) -> str:
    """The key of a tensor."""
    return ".".join(parts)


def is_checkpoint_folder(path: Path) -> bool:
    """Whether a path is a folder that holds a sharded checkpoint."""
    return (path / REST).is_file()


def beside(path: Path, kind: Literal["new", "old"]) -> Path:
    """Where a folder is while it is written, and where the one before it waits to be removed."""
    return path.with_name(f"{path.name}.{kind}")


def settled(path: Path) -> Path:
    """What stands for ``path``: another one where a process ended between two renames.

    What is whole has its ``REST``, which is written last; a file (of a run without shards) that
    waits to be removed was whole.
    """
    old = beside(path, "old")
    found = [p for p in (path, beside(path, "new"), old) if is_checkpoint_folder(p)]
    found += [old] if old.is_file() else []
    return path if path.exists() or not found else found[0]


def make_room(path: Path) -> Path:
    """Prepare for a new folder ``path``: what stands for it gets its name, half of one goes.

    Returns:
        An empty folder to write in, which ``put_in_place`` takes.
    """
    found = settled(path)
    if found != path:
        found.rename(path)
    new = beside(path, "new")
    _remove(new)
    new.mkdir(parents=True)
    return new


def put_in_place(new: Path, path: Path) -> None:
    """Two renames, whether there is a file, a folder or nothing.

    At every moment one whole checkpoint is there, which ``settled`` finds.
    """
    old = beside(path, "old")
    _remove(old)
    if path.exists():
        path.rename(old)
    new.rename(path)
    sync_folder(path.parent)
    _remove(old)


def tensors_in(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint folder by their keys, without their data (on ``meta``).

    Raises:
        CheckpointError: Its index is missing, broken, or of something else than tensors.
    """
    index = ShardReader(folder).read_metadata().state_dict_metadata
    return {
        key: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
        for key, entry in index.items()
        if isinstance(entry, TensorStorageMetadata)  # all of them
    }


def weights_in(folder: Path) -> dict[str, Tensor]:
    """The models' weights of a checkpoint folder by name, without their data (on ``meta``)."""
    prefix = flat_key(WEIGHTS, "")
    found = tensors_in(folder)
    weights = {key[len(prefix) :]: v for key, v in found.items() if key.startswith(prefix)}
    return _with_shared(folder, weights)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The models' weights, put together in this one process; optimizer states are not read."""
    return _with_shared(folder, _read(folder, flat_key(WEIGHTS, "")))


def read_rest(folder: Path) -> dict[str, Any]:
    """Everything but the tensors, weights-only.

    Raises:
        CheckpointError: Broken, damaged, or more than plain values.
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
        CheckpointError: It is damaged.
    """
    if (damage := damage_of(file)) is not None:
        others = sorted(str(p) for p in Path(given).parent.glob("*.ckpt") if p != Path(given))
        advice = f"; there are {', '.join(others[:5])}" if others else ""
        raise CheckpointError(
            f"--ckpt_path {str(given)!r} is damaged ({damage}): not what was written, by a fault "
            f"of the disk or of a copy; take another checkpoint{advice}"
        )


def read_whole(folder: Path) -> dict[str, Any]:
    """A checkpoint folder as one that was never in shards: what any strategy goes on from."""
    checkpoint = read_rest(folder)
    for number, state in enumerate(checkpoint.get("optimizer_states", ())):
        state["state"] = {}
        for key, value in _read(folder, flat_key(OPTIMIZER, str(number), "")).items():
            index, name = key.split(".", 1)
            state["state"].setdefault(int(index), {})[name] = value
    return {**checkpoint, "state_dict": read_weights(folder)}


class FolderReadingIO(TorchCheckpointIO):
    """Lightning's own way to files, which goes on from a checkpoint folder as well."""

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """A file as Lightning reads it, or a folder put together; weights-only unless asked.

        Raises:
            CheckpointError: It is damaged.
        """
        folder = settled(Path(path))
        if is_checkpoint_folder(folder):
            return read_whole(folder)
        if folder.is_file():
            require_sound(folder, path)
        if not args and kwargs.get("weights_only") is None:  # Lightning's own: False for a URL
            kwargs["weights_only"] = True
        checkpoint: dict[str, Any] = super().load_checkpoint(path, *args, **kwargs)
        return checkpoint


def read_folders(trainer: lightning.Trainer) -> None:
    """Let a Trainer go on from folders, unless somebody has given it another way to files."""
    strategy = trainer.strategy
    if type(strategy.checkpoint_io) is TorchCheckpointIO:
        strategy.checkpoint_io = FolderReadingIO()


def _with_shared(folder: Path, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A tensor that several names share is written under one of them."""
    names = read_rest(folder).get(SHARED, {})
    return weights | {name: weights[first] for name, first in names.items()}


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _read(folder: Path, prefix: str) -> dict[str, Tensor]:
    """The tensors whose keys begin so, without that beginning, in this one process."""
    state = {
        key: torch.empty_like(value, device="cpu")
        for key, value in tensors_in(folder).items()
        if key.startswith(prefix)
    }
    with warnings.catch_warnings():  # "assuming the intent is to load in a single process": it is
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load_shards(state, folder, no_dist=True)
    return {key[len(prefix) :]: value for key, value in state.items()}
