"""A run's teacher read from its cache: one side of the loss layer, without a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

from okd_lightning.errors import CacheError, ModelError
from okd_lightning.losses import PackedHead, Quantity, Side
from okd_lightning.losses.end_outcome import EndOutcome
from okd_lightning.losses.tiling import slices, tile_size
from okd_lightning.models import Vocabulary
from okd_lightning.records.batches import SOURCES, DistillBatch, Example
from okd_lightning.records.collation import collate
from okd_lightning.records.sequences import Sequences
from okd_lightning.teachers.layout import PART_POSITIONS, Place, layout_of, reading_key
from okd_lightning.teachers.settings import TeacherCache
from okd_lightning.teachers.store import Entry, from_records, record_type, to_records
from okd_lightning.teachers.terms import check_known

_FORMAT = 2
_DATASET = SOURCES.index("dataset")

Reader: TypeAlias = Callable[[Sequences], Side]
"""Computes the teacher's side at the loss tokens of some rows."""


@dataclass(frozen=True)
class TeacherKey:
    """Everything that a teacher's probabilities depend on, besides the rows.

    Attributes:
        identity: Digest of its weights and config.
        dtype: Number format of its weights.
        precision: The Trainer's.
        vocabulary: The valid ids, to which its logits are cut, and the end ids, which are merged.
    """

    identity: str
    dtype: str
    precision: str
    vocabulary: Vocabulary

    def entries(self) -> dict[str, Any]:
        """Return the key as entries of an index."""
        ids = np.asarray(self.vocabulary.invalid_ids, dtype="<i4").tobytes()
        ends = sorted(self.vocabulary.end_ids)
        return {
            **({"end_ids": ends} if len(ends) > 1 else {}),
            "teacher": self.identity,
            "teacher_dtype": self.dtype,
            "precision": self.precision,
            "vocabulary": [self.vocabulary.size, sha256(ids).hexdigest()],
        }


class CachedTeacher:
    """Reads the teacher's log-probabilities of a batch from its cache.

    Args:
        settings: Folder and size of the cache.
        vocabulary: The run's vocabulary.

    Attributes:
        part_positions: Approximate loss tokens a file.
    """

    option = "--model.teacher_cache"
    reads_new_rows = False
    part_positions = PART_POSITIONS

    def __init__(self, settings: TeacherCache, vocabulary: Vocabulary) -> None:
        self.settings = settings
        self.vocabulary = vocabulary
        self.k = min(settings.k, vocabulary.size)
        self.record = record_type(self.k, vocabulary.size, settings.dtype)
        self.entries: tuple[Entry, ...] = ()
        self._places: dict[bytes, tuple[Entry, Place]] = {}

    @property
    def folder(self) -> Path:
        """Folder of all entries."""
        return Path(self.settings.folder).expanduser()

    def entry(self, key: TeacherKey, examples: Sequence[Example]) -> Entry:
        """Return the cache entry of one dataset, existing or not."""
        layout = layout_of(examples, self.part_positions)
        full = {
            "format": _FORMAT,
            **key.entries(),
            "k": self.k,
            "logprobs": self.settings.dtype,
            "rows": layout.digest,
            "parts": [part.num_positions for part in layout.parts],
        }
        name = sha256(repr(sorted(full.items())).encode()).hexdigest()[:24]
        return Entry(self.folder / name, full, layout, self.record)

    def open(self, entries: Sequence[Entry]) -> None:
        """Open these entries for ``side``.

        Raises:
            CacheError: One is incomplete.
        """
        for entry in entries:
            entry.open()
        self.entries = tuple(entries)
        self._places = {
            key: (entry, place) for entry in entries for key, place in entry.layout.places.items()
        }

    def side(self, batch: DistillBatch, quantities: Sequence[Quantity]) -> Side:
        """Return the teacher's side: packed rows at the loss positions; a constant.

        No method uses the teacher on on-policy rows; these get an arbitrary record of the cache.

        Args:
            batch: Rows of the datasets whose entries are open.
            quantities: Quantities that will be measured.

        Raises:
            ConfigError: A quantity that needs the teacher to be run.
            CacheError: A dataset row that is not in the cache, or a broken file.
        """
        check_known(quantities, self.k, self.vocabulary.size, self.option)
        reads = batch.teacher_reads
        device = reads.input_ids.device
        ids, mask = reads.input_ids.cpu().numpy(), reads.mask.cpu().numpy()
        lengths, source = reads.lengths.tolist(), batch.source.tolist()
        found = [
            self._row(ids[row, :length], mask[row, :length], source[row])
            for row, length in enumerate(lengths)
        ]
        packed = from_records(np.concatenate(found))
        return Side(packed.to(device, non_blocking=True), PackedHead())

    def _row(self, ids: np.ndarray, mask: np.ndarray, source: int) -> np.ndarray:
        """Return [positions] records of one row."""
        count = int(mask[1:].sum())
        if not count:
            return np.empty(0, self.record)
        if source != _DATASET:
            entry, place = next(iter(self._places.values()))
            return np.repeat(entry.read(place)[:1], count)
        place_of = self._places.get(reading_key(ids, mask))
        if place_of is None:
            raise CacheError(
                "a row of this run is not in the teacher cache, which holds the dataset responses "
                "of data.train and data.val; leave --model.teacher_cache out for other loaders"
            )
        entry, place = place_of
        return entry.read(place)


def write_entry(
    entry: Entry,
    read: Reader,
    *,
    batch_size: int,
    device: torch.device,
    own: Callable[[int], bool],
    progress: Callable[[int], None] | None = None,
) -> None:
    """Run the teacher over the rows of this rank's files, and write the files.

    Args:
        entry: A prepared entry; existing files are kept.
        read: Runs the teacher.
        batch_size: Rows a forward pass.
        device: The teacher's device.
        own: Whether the file of a number is this rank's.
        progress: Called with the number of finished rows.

    Raises:
        ModelError: The teacher's log-probabilities are NaN.
    """
    for number, part in enumerate(entry.layout.parts):
        if not own(number) or entry.has_part(number):
            continue
        records = np.empty(part.num_positions, entry.record)
        done = 0
        for rows in slices(len(part.rows), batch_size):
            found = _records(collate(part.rows[rows]).to(device).teacher_reads, read, entry)
            records[done : done + len(found)] = found
            done += len(found)
            if progress is not None:
                progress(rows.stop - rows.start)
        entry.write_part(number, records)


@torch.no_grad()
def _records(reads: Sequences, read: Reader, entry: Entry) -> np.ndarray:
    """Return [positions] records of a batch, from full distributions by tiles."""
    side, targets = read(reads), reads.targets
    vocab_size = entry.key["vocabulary"][0]
    tiles = []
    for tile in slices(len(side.hidden), tile_size(vocab_size, side.hidden.device)):
        ends = EndOutcome(side.end_ids, side.hidden.device)
        logprobs = ends.merge(side.head(side.hidden[tile])).log_softmax(-1)
        if logprobs.isnan().any():
            raise ModelError(
                "--model.teacher gives NaN for a row of the data, so that nothing can be learned "
                "from it; check its weights and --model.teacher_dtype"
            )
        tiles.append(to_records(logprobs, ends.outcomes(targets[tile]), entry.record))
    return np.concatenate(tiles)
