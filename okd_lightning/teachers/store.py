"""One entry of the cache on disk: numpy files of records, and an index that completes it.

A record is a loss token: k ids, their log-probabilities, the rest's and the token's own. Each file
is written atomically. The index is written last, with the key and every file's checksum: an entry
without it is incomplete.
"""

from __future__ import annotations

import shutil
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch

from okd_lightning.durable_files import own_aside, read_json, replacing, write_json
from okd_lightning.errors import CacheError, OutputError
from okd_lightning.losses import pack_outcomes
from okd_lightning.records.shapes import LogProbs, PositionHidden, PositionIds
from okd_lightning.teachers.layout import Layout, Place

_INDEX = "index.json"
_OPEN_FILES = 256

LogProbFormat: TypeAlias = Literal["float16", "float32"]
"""Number format of the k ids' log-probabilities."""


def record_type(k: int, vocab_size: int, dtype: str) -> np.dtype[Any]:
    """Return the record type of a loss token, with two bytes per id if the vocabulary allows it.

    Args:
        k: Number of stored ids.
        vocab_size: Ids of the vocabulary.
        dtype: "float16" or "float32", of the log-probabilities of the k ids.
    """
    of_id = "<u2" if vocab_size <= 2**16 else "<u4"
    of_logprob = "<f2" if dtype == "float16" else "<f4"
    fields = [("ids", of_id, (k,)), ("logprobs", of_logprob, (k,)), ("rest", "<f4")]
    return np.dtype([*fields, ("drawn", "<f4")])


def to_records(logprobs: LogProbs, targets: PositionIds, record: np.dtype[Any]) -> np.ndarray:
    """Return [positions] records of full distributions.

    The ids are chosen, and the rest summed, before rounding.

    Args:
        logprobs: [positions, vocab] log q (nats).
        targets: [positions] the target tokens.
        record: From ``record_type``.
    """
    k = record["ids"].shape[0]
    top = logprobs.topk(k, dim=-1)
    others = logprobs.scatter(-1, top.indices, -torch.inf)
    records = np.empty(len(logprobs), record)
    records["ids"] = top.indices.cpu().numpy()
    records["logprobs"] = top.values.float().cpu().numpy()
    records["rest"] = others.logsumexp(-1).float().cpu().numpy()
    records["drawn"] = logprobs.gather(-1, targets[:, None])[:, 0].float().cpu().numpy()
    return records


def from_records(records: np.ndarray) -> PositionHidden:
    """Return [positions, 2k + 2] packed rows; rounded probabilities are scaled to sum to one."""
    ids = torch.from_numpy(records["ids"].astype(np.int64))
    known = torch.from_numpy(records["logprobs"].astype(np.float32))
    rest = torch.from_numpy(records["rest"].astype(np.float32))[:, None]
    logprobs = torch.cat([known, rest], dim=-1)
    drawn = torch.from_numpy(records["drawn"].astype(np.float32))
    return pack_outcomes(ids, logprobs - logprobs.logsumexp(-1, keepdim=True), drawn)


def make_folder(folder: Path) -> None:
    """Create ``folder`` if it does not exist.

    Raises:
        OutputError: It cannot be created or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".write-test"
        probe.touch()
        probe.unlink(missing_ok=True)  # another run may have removed it
    except OSError as error:
        raise OutputError(
            f"--model.teacher.folder: {str(folder)!r} cannot be written ({error.strerror}); choose "
            "another folder"
        ) from error


class Entry:
    """The cache of one teacher and one dataset.

    Args:
        folder: Folder of the entry.
        key: Everything that determines its content.
        layout: Its rows.
        record: Record type of a loss token.
    """

    def __init__(
        self, folder: Path, key: dict[str, Any], layout: Layout, record: np.dtype[Any]
    ) -> None:
        self.folder, self.key, self.layout, self.record = folder, key, layout, record
        self._open: OrderedDict[int, np.ndarray] = OrderedDict()
        self._checksums: list[int] = []
        self._checked: set[int] = set()

    @property
    def num_bytes(self) -> int:
        """Bytes of all records."""
        return self.layout.num_positions * self.record.itemsize

    def state(self) -> tuple[bool, str]:
        """Return whether it is complete, and else the problem ("" if nothing is there)."""
        path = self.folder / _INDEX
        if not path.is_file():
            return False, ""
        try:
            index = read_json(path)
        except ValueError:
            return False, f"{path} is broken"
        if index["key"] != self.key:
            return False, f"{path} is of another teacher or other data"
        for number in range(len(self.layout.parts)):
            if not self.has_part(number):
                return False, f"{self._path(number)} is missing or cut short"
        return True, ""

    def has_part(self, number: int) -> bool:
        """Return whether a file exists with the right type and size."""
        try:
            records = np.load(self._path(number), mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError):  # no such file, or one that ends too early
            return False
        expected = (self.layout.parts[number].num_positions,)
        return records.dtype == self.record and records.shape == expected

    def prepare(self) -> None:
        """Create the folder, without an index.

        Raises:
            OutputError: It cannot be written, or the disk has too little space.
        """
        make_folder(self.folder)
        if not self.state()[0]:  # else another run has just finished it
            (self.folder / _INDEX).unlink(missing_ok=True)
        free = shutil.disk_usage(self.folder).free
        missing = [
            part.num_positions
            for number, part in enumerate(self.layout.parts)
            if not self.has_part(number)
        ]
        needed = sum(missing) * self.record.itemsize
        if needed > free:
            raise OutputError(
                f"--model.teacher.folder: {self.folder} needs {needed / 1e9:.2f} GB more and the "
                f"disk has {free / 1e9:.2f} GB; choose another folder, or a smaller "
                "--model.teacher.k"
            )

    def write_part(self, number: int, records: np.ndarray) -> None:
        """Write one file atomically; another run may write the same file at the same time."""
        path = self._path(number)
        with replacing(path, own_aside(path)) as file:
            np.save(file, records, allow_pickle=False)

    def finish(self) -> None:
        """Write the index, which completes the entry."""
        parts = range(len(self.layout.parts))
        checksums = [_checksum(self._load(number)) for number in parts]
        index = self.folder / _INDEX
        write_json(index, {"key": self.key, "checksums": checksums}, own_aside(index))

    def open(self) -> None:
        """Prepare for ``read``.

        Raises:
            CacheError: It is incomplete, as seen from this process.
        """
        is_whole, problem = self.state()
        if not is_whole:
            raise CacheError(
                f"--model.teacher.folder: {problem or f'{self.folder} is not there'}, as seen by "
                "this process; all processes of a run need one folder that they share"
            )
        self._checksums = read_json(self.folder / _INDEX)["checksums"]

    def read(self, place: Place) -> np.ndarray:
        """Return the records of one row.

        Raises:
            CacheError: The file's checksum differs.
        """
        records = self._open.get(place.part)
        if records is None:
            records = self._open[place.part] = self._checked_part(place.part)
        self._open.move_to_end(place.part)
        while len(self._open) > _OPEN_FILES:
            self._open.popitem(last=False)
        return records[place.start : place.start + place.count]

    def _checked_part(self, number: int) -> np.ndarray:
        records = self._load(number)
        if number not in self._checked and _checksum(records) != self._checksums[number]:
            raise CacheError(
                f"{self._path(number)} is not what was written there; delete it, and the next run "
                "writes it again"
            )
        self._checked.add(number)
        return records

    def _load(self, number: int) -> np.ndarray:
        return np.load(self._path(number), mmap_mode="r", allow_pickle=False)

    def _path(self, number: int) -> Path:
        return self.folder / f"part-{number:05d}.npy"


def _checksum(records: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(records).view(np.uint8).data)
