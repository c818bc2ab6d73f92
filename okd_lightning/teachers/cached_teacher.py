"""The CachedTeacher: a loaded teacher whose log-probabilities are read from disk in training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from hashlib import sha256
from pathlib import Path
from typing import Any, Self, final, get_args

import numpy as np
from lightning.pytorch.utilities import rank_zero_info

from okd_lightning.errors import CacheError, ConfigError
from okd_lightning.losses import PackedHead, Quantity, Side
from okd_lightning.models import ModelArgument, ModelSource, Vocabulary
from okd_lightning.records.batches import SOURCES, DistillBatch, Example
from okd_lightning.teachers.base import Teacher
from okd_lightning.teachers.cache_preparation import TeacherKey, prepared_entries
from okd_lightning.teachers.layout import PART_POSITIONS, Place, layout_of, reading_key
from okd_lightning.teachers.loaded import LoadedTeacher
from okd_lightning.teachers.packed import PackedTeacher
from okd_lightning.teachers.run import Opening, TeacherRun
from okd_lightning.teachers.several import argument_of
from okd_lightning.teachers.store import Entry, LogProbFormat, from_records, record_type
from okd_lightning.teachers.terms import check_known

_FORMAT = 2
_DATASET = SOURCES.index("dataset")


@final
class CachedTeacher(PackedTeacher):
    """Teacher whose log-probabilities are written to disk once and read from there in training.

    The teacher is in memory while they are written, and outside of training (validate, test). For
    every loss token of the dataset responses there are its k most likely ids, the rest and the
    target.

    Args:
        model: The teacher, in the forms of LoadedTeacher, or a TeacherEnsemble.
        folder: Folder of caches, with one entry for each teacher, dataset and k.
        k: Ids that keep their own log-probability; 48 take at most 296 bytes per token in float16.
        dtype: Number format of the log-probabilities.

    Attributes:
        part_positions: Approximate loss tokens per file.

    Raises:
        ConfigError: A number out of its range, or a teacher of a kind that cannot be cached.
    """

    option = "--model.teacher CachedTeacher"
    part_positions = PART_POSITIONS

    def __init__(
        self,
        model: Teacher | ModelArgument,
        folder: str,
        k: int = 48,
        dtype: LogProbFormat = "float16",
    ) -> None:
        if k < 1:
            raise ConfigError(f"model.teacher.k must be at least 1, got {k}")
        if dtype not in get_args(LogProbFormat):
            raise ConfigError(f"model.teacher.dtype is {dtype!r}; expected float16 or float32")
        self.inner = model if isinstance(model, Teacher) else LoadedTeacher(model)
        _check_cacheable(self.inner)
        self.dtype = dtype
        self.k = self._wanted = k
        self._folder = folder
        self.record = record_type(k, k, dtype)  # of the run's vocabulary, once it is known
        self.entries: tuple[Entry, ...] = ()
        self._places: dict[bytes, tuple[Entry, Place]] = {}

    @property
    def own_source(self) -> ModelSource | None:
        """The inner teacher's."""
        return self.inner.own_source

    @property
    def own_sources(self) -> tuple[ModelSource, ...]:
        """The inner teacher's."""
        return self.inner.own_sources

    @property
    def arguments(self) -> Mapping[str, Any]:
        """Model, folder and size."""
        own = {"folder": self._folder, "k": self._wanted, "dtype": self.dtype}
        return {"model": argument_of(self.inner), **own}

    def use_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Set the vocabulary, also of the inner teacher."""
        super().use_vocabulary(vocabulary)
        self.inner.use_vocabulary(vocabulary)

    def join(self, run: TeacherRun) -> Self:
        """Return a copy for ``run``, with the size of its vocabulary."""
        own = super().join(run)
        own.inner = self.inner.join(run)
        own.k = min(self._wanted, run.vocabulary.size)
        own.record = record_type(own.k, run.vocabulary.size, self.dtype)
        return own

    def during(self, is_training: bool) -> Teacher:
        """Return this teacher in training, and the loaded one in other commands."""
        return self if is_training else self.inner

    def build(self) -> None:
        """Remove the model from memory."""
        self.inner.unload()

    def open(self, opening: Opening) -> None:
        """Open the cache of this run's teacher and data; write it first where it does not exist.

        Raises:
            OKDLightningError: See ``prepared_entries``.
        """
        entries, is_new = prepared_entries(self.inner, self.folder, self.entry, opening)
        self.open_entries(entries)
        positions = sum(entry.layout.num_positions for entry in entries)
        names = " and ".join(str(entry.folder) for entry in entries)
        rank_zero_info(
            f"teacher: {'written to' if is_new else 'read from'} its cache, {self.k} ids per "
            "token, "
            f"{positions:,} tokens of {self.record.itemsize} bytes ({names or 'nothing to keep'}); "
            f"methods read their divergences as TopK(., {self.k}), at most the exact ones; "
            "validation takes these as val/top_k_*, and no measure of the teacher on on-policy "
            "samples"
        )

    @property
    def folder(self) -> Path:
        """Folder of all entries."""
        return Path(self._folder).expanduser()

    def entry(self, key: TeacherKey, examples: Sequence[Example]) -> Entry:
        """Return the cache entry of one dataset, existing or not."""
        layout = layout_of(examples, self.part_positions)
        full = {
            "format": _FORMAT,
            **key.entries(),
            "k": self.k,
            "logprobs": self.dtype,
            "rows": layout.digest,
            "parts": [part.num_positions for part in layout.parts],
        }
        name = sha256(repr(sorted(full.items())).encode()).hexdigest()[:24]
        return Entry(self.folder / name, full, layout, self.record)

    def open_entries(self, entries: Sequence[Entry]) -> None:
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
        check_known(quantities, self.k, self.run.vocabulary.size, self.option)
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
                "of data.train and data.val; give --model.teacher a folder or hub id for "
                "other loaders"
            )
        entry, place = place_of
        return entry.read(place)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copy the loaded teacher, and share the open files."""
        own = super().__deepcopy__(memo)
        own.inner = deepcopy(self.inner, memo)
        return own


def _check_cacheable(teacher: Teacher) -> None:
    """Refuse a teacher that has no distribution of its own for every text.

    Raises:
        ConfigError: The message names what can be cached.
    """
    if teacher.own_source is None or not teacher.covers_vocabulary or teacher.names:
        raise ConfigError(
            f"--model.teacher CachedTeacher keeps one distribution for each text, and "
            f"{type(teacher).__name__} has none: give --model.teacher.model a folder, a hub id or "
            "TeacherEnsemble"
        )
