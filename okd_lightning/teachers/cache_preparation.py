"""The teacher's cache at the start of a run: find it, or write it with the teacher."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeAlias, cast

import lightning
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from okd_lightning.checkpoints.folder_lock import folder_lock
from okd_lightning.errors import CacheError
from okd_lightning.models import Vocabulary
from okd_lightning.records.batches import Example
from okd_lightning.teachers.base import Teacher
from okd_lightning.teachers.cache_writing import write_entry
from okd_lightning.teachers.identity import teacher_identity
from okd_lightning.teachers.run import Opening
from okd_lightning.teachers.store import Entry, make_folder

_OPTION = "--model.teacher CachedTeacher"


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


EntryOf: TypeAlias = Callable[[TeacherKey, Sequence[Example]], Entry]
"""Function from a key and the rows of a dataset to their entry, existing or not."""


def prepared_entries(
    teacher: Teacher, folder: Path, entry_of: EntryOf, opening: Opening
) -> tuple[list[Entry], bool]:
    """Return the complete entries of this run's data, and whether some were written now.

    Every rank writes its share; no rank reads before all have written.

    Args:
        teacher: The teacher, which is loaded where entries are missing.
        folder: Folder of all entries.
        entry_of: Names an entry.
        opening: The run that begins.

    Raises:
        ConfigError: Data that do not come from a RolloutDataModule.
        CacheError: The ranks do not see one folder.
        OutputError: The folder cannot be written.
    """
    trainer = opening.trainer
    sets, batch_size = opening.read_rows(_OPTION)
    own_key = _key(teacher, folder, trainer) if trainer.is_global_zero else None
    key = cast(TeacherKey, trainer.strategy.broadcast(own_key))
    entries = [entry_of(key, examples) for examples in sets]
    with _alone(folder, entries, trainer):
        missing = trainer.strategy.broadcast(_missing(entries) if trainer.is_global_zero else [])
        if missing:
            wanted = [entries[i] for i in missing]
            _check_shared(wanted, trainer)
            _write(wanted, teacher, opening, batch_size)
    return entries, bool(missing)


def _alone(
    folder: Path, entries: Sequence[Entry], trainer: lightning.Trainer
) -> AbstractContextManager[Any]:
    """Lock the cache where parts are missing, so that only one run writes it."""
    if not trainer.is_global_zero or all(entry.state()[0] for entry in entries):
        return nullcontext()
    return folder_lock(folder, f"--model.teacher.folder {str(folder)!r}", waits=True)


def _key(teacher: Teacher, folder: Path, trainer: lightning.Trainer) -> TeacherKey:
    """Return the key; only rank 0 reads the weight files for it."""
    run = teacher.run
    make_folder(folder)
    return TeacherKey(
        identity=teacher.identity(
            partial(teacher_identity, vocab_size=run.vocabulary.size, folder=folder)
        ),
        dtype=run.dtype,
        precision=str(trainer.precision),
        vocabulary=run.vocabulary,
    )


def _missing(entries: Sequence[Entry]) -> list[int]:
    """Return which entries have to be written; warn of broken ones."""
    found = []
    for number, entry in enumerate(entries):
        is_whole, problem = entry.state()
        if problem:
            rank_zero_warn(f"{problem}: this part of the teacher's cache is written again")
        if not is_whole:
            entry.prepare()
            found.append(number)
    return found


def _check_shared(entries: Sequence[Entry], trainer: lightning.Trainer) -> None:
    """Check that all ranks see the folders that rank 0 has made; all ranks stop otherwise."""
    is_seen = all(entry.folder.is_dir() for entry in entries)
    if not trainer.strategy.reduce_boolean_decision(is_seen, all=True):
        raise CacheError(
            f"--model.teacher.folder: {entries[0].folder.parent} is not one folder for all "
            "processes of this run, and each of them writes a part of the cache; choose one that "
            "they share"
        )


def _write(entries: Sequence[Entry], teacher: Teacher, opening: Opening, batch_size: int) -> None:
    trainer, device = opening.trainer, opening.device
    rank, world_size = trainer.global_rank, trainer.world_size
    num_bytes = sum(entry.num_bytes for entry in entries)
    rank_zero_info(
        f"the teacher reads the data once; its cache goes to {entries[0].folder.parent} "
        f"({num_bytes / 1e6:.1f} MB)"
    )
    reader = teacher.join(teacher.run)
    reader.build()
    if reader.module is not None:  # one in host memory is moved by itself
        reader.module.to(device)
    rows = sum(
        len(part.rows)
        for entry in entries
        for number, part in enumerate(entry.layout.parts)
        if number % world_size == rank and not entry.has_part(number)
    )
    with (
        torch.no_grad(),
        trainer.precision_plugin.forward_context(),
        opening.progress(trainer, "teacher reads", rows) as progress,
    ):
        for entry in entries:
            write_entry(
                entry,
                partial(reader.side, quantities=()),
                batch_size=batch_size,
                device=device,
                own=lambda number: number % world_size == rank,
                progress=progress,
            )
    reader.unload()  # training needs its memory
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trainer.strategy.barrier("teacher_cache_parts")
    if trainer.is_global_zero:
        for entry in entries:
            entry.finish()
    trainer.strategy.barrier("teacher_cache_index")
