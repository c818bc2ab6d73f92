"""Checkpoint folders of another author, and damaged ones.

Frozen here: an index that names any function or class besides those of an index, an entry of bytes
(which torch unpickles without limits), a shard outside of the folder or with transformations is
refused by every reader, and no code of it has run; flipped bytes of a shard, of the rest and of a
file are found at every way in, with one error that names the file; a sound folder is read by its
own reader as by torch's.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from okd_lightning.checkpoints.files import newest_checkpoint, read_checkpoint
from okd_lightning.checkpoints.folder_index import INDEX, ShardReader, load_shards
from okd_lightning.checkpoints.folders import REST, FolderReadingIO, read_whole
from okd_lightning.errors import CheckpointError

WEIGHT = torch.arange(2000, dtype=torch.float32)
SHARD = "__0_0.distcp"


class Runs:
    """Object whose pickle runs a command."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


class Call:
    """Object whose pickle calls the function that it was made with."""

    def __init__(self, function, *arguments) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint folder with one weight."""
    path = tmp_path / "checkpoints" / "last.ckpt"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.save({"state_dict.w": WEIGHT}, checkpoint_id=path, no_dist=True)
    torch.save({"okd_lightning": {"config": None}, "global_step": 1}, path / REST)
    return path


def index_of(folder: Path):
    return dcp.FileSystemReader(folder).read_metadata()


def write_index(folder: Path, index: object) -> None:
    (folder / INDEX).write_bytes(pickle.dumps(index))


def readers(folder: Path):
    """Return all functions that read a folder's tensors."""
    state = {"state_dict.w": torch.zeros_like(WEIGHT)}
    return (
        lambda: read_checkpoint(str(folder), with_weights=True),
        lambda: FolderReadingIO().load_checkpoint(folder),
        lambda: load_shards(state, folder, no_dist=True),
    )


def flip(path: Path, needle: bytes) -> None:
    """Flip two bits of the bytes after ``needle``."""
    content = bytearray(path.read_bytes())
    at = content.index(needle)
    content[at] ^= 1
    content[at + 1] ^= 1
    path.write_bytes(content)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_a_sound_folder_is_read(folder):
    index, own = index_of(folder), ShardReader(folder).read_metadata()
    assert own.state_dict_metadata == index.state_dict_metadata
    assert own.storage_data == index.storage_data
    assert torch.equal(read_whole(folder)["state_dict"]["w"], WEIGHT)


def as_bytes(folder: Path, marker: Path) -> object:
    """Torch's classes alone: the weight as bytes, in the shard a pickle that runs a command."""
    content = io.BytesIO()
    torch.save(Runs(marker), content)
    (folder / SHARD).write_bytes(content.getvalue())
    index = index_of(folder)
    index.state_dict_metadata = {"state_dict.w": BytesStorageMetadata()}
    for place, info in list(index.storage_data.items()):
        del index.storage_data[place]
        object.__setattr__(place, "offset", None)
        info.length = len(content.getvalue())
        index.storage_data[place] = info
    return index


def elsewhere(folder: Path, marker: Path) -> object:
    index = index_of(folder)
    for info in index.storage_data.values():
        info.relative_path = f"../../{marker.name}"
    return index


def transformed(folder: Path, marker: Path) -> object:
    index = index_of(folder)
    for info in index.storage_data.values():
        info.transform_descriptors = ["stream.zstd"]
    return index


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize(
    ("forge", "named"),
    [
        (lambda folder, marker: Runs(marker), "system"),
        (lambda folder, marker: [Runs(marker)], "system"),
        (lambda folder, marker: Call(torch.load, str(marker)), "torch.serialization.load"),
        (lambda folder, marker: Call(torch.nn.Linear, 2, 2), "torch.nn"),
        (lambda folder, marker: Call(getattr, torch.Size, "mro"), "getattr"),
        (lambda folder, marker: {"state_dict_metadata": {}}, "dict in place of an index"),
        (as_bytes, "state_dict.w as BytesStorageMetadata"),
        (elsewhere, "outside of the folder"),
        (transformed, "transformations"),
    ],
)
def test_a_forged_index_runs_nothing(folder, tmp_path, forge, named):
    marker = tmp_path / "ran"
    write_index(folder, forge(folder, marker))
    for read in readers(folder):
        with pytest.raises(CheckpointError, match=named) as raised:
            read()
        assert str(folder) in str(raised.value)
        assert "take another checkpoint" in str(raised.value)
    assert not marker.exists()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_the_forgeries_would_run(folder, tmp_path):
    """Torch's own reader runs the command: the test above can fail."""
    marker = tmp_path / "ran"
    write_index(folder, as_bytes(folder, marker))
    with contextlib.suppress(CheckpointException):  # whatever comes after the command
        dcp.load({"state_dict.w": torch.zeros_like(WEIGHT)}, checkpoint_id=folder, no_dist=True)
    assert marker.exists()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize("part", [SHARD, REST])
def test_flipped_bytes_of_a_folder_are_found(folder, part):
    flip(folder / part, WEIGHT[1000:1002].numpy().tobytes() if part == SHARD else b"global_step")
    with pytest.raises(CheckpointError, match="damaged") as raised:
        read_whole(folder)
    assert str(folder) in str(raised.value)
    assert "checksum" in str(raised.value)
    other = folder.with_name("other.ckpt")
    torch.save({"okd_lightning": {"config": None}, "global_step": 0}, other)
    if part == REST:
        with pytest.warns(UserWarning, match="cannot be read"):
            assert newest_checkpoint(folder.parents[1]) == str(other)


def test_a_lost_shard_is_named(folder):
    (folder / SHARD).unlink()
    with pytest.raises(CheckpointError, match=f"{SHARD} is damaged.*No such file"):
        read_whole(folder)


def test_flipped_bytes_of_a_file_are_found_at_every_way_in(tmp_path):
    path = tmp_path / "checkpoints" / "some.ckpt"
    path.parent.mkdir()
    torch.save({"okd_lightning": {}, "global_step": 1, "state_dict": {"w": WEIGHT}}, path)
    assert torch.equal(read_checkpoint(str(path))["state_dict"]["w"], WEIGHT)
    flip(path, WEIGHT[1000:1002].numpy().tobytes())
    assert not torch.equal(torch.load(path)["state_dict"]["w"], WEIGHT)
    for read in (read_checkpoint, FolderReadingIO().load_checkpoint):
        with pytest.raises(CheckpointError, match=r"is damaged .*checksum.*take another") as raised:
            read(str(path))
        assert str(path) in str(raised.value)


def test_a_file_is_compared_with_its_checksums_once(tmp_path, monkeypatch):
    path = tmp_path / "some.ckpt"
    torch.save({"okd_lightning": {}, "global_step": 1, "state_dict": {}}, path)
    read_checkpoint(str(path))
    monkeypatch.setattr("zipfile.ZipFile.testzip", lambda self: pytest.fail("compared again"))
    read_checkpoint(str(path))
    FolderReadingIO().load_checkpoint(path)
