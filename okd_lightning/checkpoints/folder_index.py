"""Index (``.metadata``) and shards of a checkpoint folder, read without running their content.

The index is a pickle, and a pickle can run a program. Here it may hold only the classes of
``torch.distributed.checkpoint.metadata``, sizes, dtypes and plain containers; every entry is a
tensor (torch unpickles entries of bytes without restrictions), and every shard is in the folder.
The index is then rebuilt from plain numbers and names.
"""

from __future__ import annotations

import io
import pathlib
import pickle
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.futures import Future

from okd_lightning.checkpoints.integrity import damage_in
from okd_lightning.errors import CheckpointError

INDEX = ".metadata"

_CLASSES = {
    (dcp_metadata.__name__, name): getattr(dcp_metadata, name)
    for name in (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    )
} | {
    (_StorageInfo.__module__, "_StorageInfo"): _StorageInfo,
    ("torch", "Size"): torch.Size,
    ("collections", "OrderedDict"): dict,
    ("pathlib", "PosixPath"): pathlib.PurePosixPath,
    ("pathlib._local", "PosixPath"): pathlib.PurePosixPath,
}
_LAYOUT = ("torch.serialization", "_get_layout")


class ShardReader(dcp.FileSystemReader):
    """Reader of a checkpoint folder, trusted or not; usable with ``dcp.load``.

    Args:
        folder: The checkpoint.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the index.

        Raises:
            CheckpointError: The index is missing, broken, or holds anything but an index of
                tensors.
        """
        del args, kwargs
        try:
            with open(pathlib.Path(self.path) / INDEX, "rb") as file:
                metadata = _plain(_IndexUnpickler(file).load())
        except _ForeignIndexError as error:
            raise CheckpointError(
                f"--ckpt_path {str(self.path)!r}: the index {INDEX} holds {error}, which no index "
                "of tensors needs: it was not written by okd-lightning and is not read; take "
                "another checkpoint"
            ) from error
        except (OSError, EOFError, ValueError, TypeError, LookupError, pickle.UnpicklingError) as e:
            raise CheckpointError(
                f"--ckpt_path {str(self.path)!r}: the index {INDEX} is missing or broken; the run "
                "was stopped while it wrote this checkpoint: take another one"
            ) from e
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read the tensors of a plan, after a comparison of each with its checksums.

        Raises:
            CheckpointError: A shard is missing or damaged.
        """
        for item in plan.items:
            about = self.storage_data[item.storage_index]
            path = pathlib.Path(self.path) / about.relative_path
            try:
                with open(path, "rb") as file:
                    file.seek(about.offset)
                    damage = damage_in(io.BytesIO(file.read(about.length)))
            except OSError as error:
                damage = str(error.strerror)
            if damage is not None:
                raise CheckpointError(
                    f"--ckpt_path {str(self.path)!r}: {about.relative_path} is damaged ({damage}, "
                    f"in {item.storage_index.fqn}); take another checkpoint"
                )
        return super().read_data(plan, planner)


def load_shards(state: dict[str, Any], folder: pathlib.Path, no_dist: bool = False) -> None:
    """Fill tensors in place from a checkpoint folder.

    Args:
        state: Tensors by key; whole or in shards.
        folder: The checkpoint.
        no_dist: Read in this one process; otherwise all ranks call this, each for its part.

    Raises:
        CheckpointError: A shard is missing, damaged, or holds other tensors; on all ranks.
    """
    try:
        dcp.load(state, storage_reader=ShardReader(folder), no_dist=no_dist)
    except CheckpointException as error:  # wraps the errors of the ranks
        first = next(iter(error.failures.values()))[0]
        if isinstance(first, CheckpointError):
            raise first from error
        raise CheckpointError(
            f"--ckpt_path {str(folder)!r} cannot be read ({first}); take another checkpoint"
        ) from error


class _ForeignIndexError(Exception):
    """Content that does not belong in an index of tensors."""


class _IndexUnpickler(pickle.Unpickler):
    """Unpickler that resolves the classes of an index and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _CLASSES:
            return _CLASSES[module, name]
        if (module, name) == _LAYOUT:
            return _strided
        found = getattr(torch, name, None) if module == "torch" else None
        if isinstance(found, torch.dtype):
            return found
        raise _ForeignIndexError(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise _ForeignIndexError(f"a reference to {pid!r}")


def _strided(name: object) -> torch.layout:
    if name != "torch.strided":
        raise _ForeignIndexError(f"a tensor of layout {name}")
    return torch.strided


def _plain(read: Any) -> Metadata:
    """Rebuild an index from integers, names, dtypes and sizes, without other attributes."""
    if type(read) is not Metadata:
        raise _ForeignIndexError(f"a {type(read).__name__} in place of an index")
    entries = dict(vars(read)["state_dict_metadata"])
    stored = dict(vars(read)["storage_data"])
    return Metadata(
        state_dict_metadata={_name(key): _entry(key, value) for key, value in entries.items()},
        storage_data={_place(key): _shard(value) for key, value in stored.items()},
    )


def _entry(key: str, entry: Any) -> TensorStorageMetadata:
    if type(entry) is not TensorStorageMetadata:
        raise _ForeignIndexError(f"{key} as {type(entry).__name__}")
    about = vars(entry)
    dtype = vars(about["properties"])["dtype"]
    if not isinstance(dtype, torch.dtype):
        raise _ForeignIndexError(f"{dtype!r} as a dtype")
    chunks = [
        ChunkStorageMetadata(_size(vars(c)["offsets"]), _size(vars(c)["sizes"]))
        for c in about["chunks"]
    ]
    return TensorStorageMetadata(TensorProperties(dtype=dtype), _size(about["size"]), chunks)


def _place(key: Any) -> MetadataIndex:
    if type(key) is not MetadataIndex:
        raise _ForeignIndexError(f"{type(key).__name__} as the place of a tensor")
    about: Mapping[str, Any] = vars(key)
    offset, index = about.get("offset"), about.get("index")
    return MetadataIndex(
        _name(about["fqn"]),
        None if offset is None else _size(offset),
        None if index is None else _number(index),
    )


def _shard(info: Any) -> _StorageInfo:
    if type(info) is not _StorageInfo:
        raise _ForeignIndexError(f"{type(info).__name__} as a shard")
    about = vars(info)
    name = _name(about["relative_path"])
    if pathlib.PurePath(name).name != name or "\\" in name:
        raise _ForeignIndexError(f"a shard outside of the folder ({name!r})")
    if about.get("transform_descriptors"):
        raise _ForeignIndexError(f"transformations of a shard ({about['transform_descriptors']!r})")
    return _StorageInfo(name, _number(about["offset"]), _number(about["length"]))


def _name(value: Any) -> str:
    if type(value) is not str:
        raise _ForeignIndexError(f"{type(value).__name__} as a name")
    return value


def _size(value: Any) -> torch.Size:
    return torch.Size([_number(n) for n in value])


def _number(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise _ForeignIndexError(f"{value!r} as a number")
    return value
