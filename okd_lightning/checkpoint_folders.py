"""Sharded checkpoints as they lie on disk: a folder of tensor parts, and one file of the rest.

Owns the names in it and reading it in one process. The index of the parts (``.metadata``) is a
pickle, which runs code when it is read: such folders are for the run's owner, and what is given to
others is an export.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from okd_lightning.errors import CheckpointError

REST = "meta.pt"
"""Everything but tensors of models and optimizers."""

WEIGHTS, OPTIMIZER = "state_dict", "optimizer"
"""How the tensors' keys begin."""

_INDEX = ".metadata"


def flat_key(*parts: str) -> str:
    """The key of a tensor."""
    return ".".join(parts)


def is_checkpoint_folder(path: Path) -> bool:
    """Whether a path is a folder that holds a sharded checkpoint."""
    return (path / REST).is_file()


def tensors_in(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint folder by their keys, without their data (on ``meta``).

    Raises:
        CheckpointError: Its index is missing or broken.
    """
    try:
        index = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    except (OSError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"--ckpt_path {str(folder)!r}: the index {_INDEX} is missing or broken; the run was "
            "stopped while it wrote this checkpoint: take another one"
        ) from error
    return {
        key: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
        for key, entry in index.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def weights_in(folder: Path) -> dict[str, Tensor]:
    """The models' weights of a checkpoint folder by name, without their data (on ``meta``)."""
    prefix = flat_key(WEIGHTS, "")
    found = tensors_in(folder)
    return {key[len(prefix) :]: v for key, v in found.items() if key.startswith(prefix)}


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The models' weights, put together in this one process; optimizer states are not read."""
    weights = {name: torch.empty_like(v, device="cpu") for name, v in weights_in(folder).items()}
    state = {flat_key(WEIGHTS, name): value for name, value in weights.items()}
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    return weights


def read_rest(folder: Path) -> dict[str, Any]:
    """Everything but the tensors, weights-only.

    Raises:
        CheckpointError: Broken, or more than plain values.
    """
    try:
        rest = torch.load(folder / REST, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"--ckpt_path {str(folder)!r}: {REST} is broken, or holds more than tensors and plain "
            "values: no checkpoint of okd-lightning"
        ) from error
    assert isinstance(rest, dict)
    return rest
