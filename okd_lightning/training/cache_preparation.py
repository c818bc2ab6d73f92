"""The teacher's cache at the start of a run: find it, or write it with the teacher."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Protocol, TypeAlias, cast

import lightning
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn
from transformers import PreTrainedModel

from okd_lightning.checkpoints.folder_lock import folder_lock
from okd_lightning.data import RolloutDataModule
from okd_lightning.data.progress import rollout_progress
from okd_lightning.errors import CacheError, ConfigError
from okd_lightning.losses import Side, Term
from okd_lightning.models import ModelSource
from okd_lightning.records.batches import Example, Sequences
from okd_lightning.teachers.cached_teacher import CachedTeacher, TeacherKey, write_entry
from okd_lightning.teachers.identity import teacher_identity
from okd_lightning.teachers.store import Entry, make_folder


class TeachingModule(Protocol):
    """The part of a DistillationModule that the preparation uses."""

    cached_teacher: CachedTeacher | None

    @property
    def teacher_dtype_name(self) -> str:
        """Number format of the teacher's weights."""

    @property
    def teacher_source(self) -> ModelSource | None:
        """Source from which the teacher is loaded."""

    @property
    def device(self) -> torch.device:
        """Device of the student."""

    def load_teacher(self) -> PreTrainedModel:
        """Load a frozen teacher in eval mode that nothing else refers to."""


ModelReader: TypeAlias = Callable[[PreTrainedModel, Sequences], Side]
"""Runs a model over some rows; returns its hidden states and head at the loss tokens."""


def prepare_cache(
    module: TeachingModule, trainer: lightning.Trainer, terms: Sequence[Term], read: ModelReader
) -> None:
    """Open the cache of this run's teacher and data; write it first where it does not exist.

    Every rank writes its share; no rank reads before all have written.

    Args:
        module: The teacher's module.
        trainer: Trainer of the run that begins.
        terms: The run's terms.
        read: Runs a model.

    Raises:
        ConfigError: Data that do not come from a RolloutDataModule.
        CacheError: The ranks do not see one folder.
        OutputError: The folder cannot be written.
    """
    cached = module.cached_teacher
    assert cached is not None
    sets = _example_sets(terms, trainer)
    key = cast(TeacherKey, trainer.strategy.broadcast(_key(module, trainer, cached)))
    entries = [cached.entry(key, examples) for examples in sets]
    with _alone(cached, entries, trainer):
        missing = trainer.strategy.broadcast(_missing(entries) if trainer.is_global_zero else [])
        if missing:
            _check_shared([entries[i] for i in missing], trainer)
            _write([entries[i] for i in missing], module, trainer, read)
    cached.open(entries)
    _announce(cached, is_new=bool(missing))


def _alone(
    cached: CachedTeacher, entries: Sequence[Entry], trainer: lightning.Trainer
) -> AbstractContextManager[Any]:
    """Lock the cache where parts are missing, so that only one run writes it."""
    if not trainer.is_global_zero or all(entry.state()[0] for entry in entries):
        return nullcontext()
    what = f"--model.teacher_cache {str(cached.folder)!r}"
    return folder_lock(cached.folder, what, waits=True)


def _example_sets(terms: Sequence[Term], trainer: lightning.Trainer) -> list[Sequence[Example]]:
    """Return the dataset responses for which training and validation need the teacher."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(data, RolloutDataModule):
        raise ConfigError(
            "model.teacher_cache reads its rows from a RolloutDataModule: train on one, or leave "
            "it out"
        )
    sets: list[Sequence[Example]] = []
    if any(q.needs_teacher for term in terms for q in term.quantities):
        sets.append(data.examples("train", needs_response=True).examples)
    if data.sources["val"] is not None and trainer.limit_val_batches:
        sets.append([e for e in data.examples("val").examples if e.response_ids])
    return [examples for examples in sets if examples]


def _key(
    module: TeachingModule, trainer: lightning.Trainer, cached: CachedTeacher
) -> TeacherKey | None:
    """Return the key on rank 0, the only rank that reads the weight files."""
    if not trainer.is_global_zero:
        return None
    source = module.teacher_source
    assert source is not None
    make_folder(cached.folder)
    return TeacherKey(
        identity=teacher_identity(source, cached.vocabulary.size, cached.folder),
        dtype=module.teacher_dtype_name,
        precision=str(trainer.precision),
        vocabulary=cached.vocabulary,
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
            f"--model.teacher_cache: {entries[0].folder.parent} is not one folder for all "
            "processes of this run, and each of them writes a part of the cache; choose one that "
            "they share"
        )


def _write(
    entries: Sequence[Entry],
    module: TeachingModule,
    trainer: lightning.Trainer,
    read: ModelReader,
) -> None:
    data = cast(RolloutDataModule, trainer.datamodule)  # type: ignore[attr-defined]
    rank, world_size = trainer.global_rank, trainer.world_size
    num_bytes = sum(entry.num_bytes for entry in entries)
    rank_zero_info(
        f"the teacher reads the data once; its cache goes to {entries[0].folder.parent} "
        f"({num_bytes / 1e6:.1f} MB)"
    )
    teacher = module.load_teacher()
    cast(nn.Module, teacher).to(module.device)
    rows = sum(
        len(part.rows)
        for entry in entries
        for number, part in enumerate(entry.layout.parts)
        if number % world_size == rank and not entry.has_part(number)
    )
    with (
        torch.no_grad(),
        trainer.precision_plugin.forward_context(),
        rollout_progress(trainer, "teacher reads", rows) as progress,
    ):
        for entry in entries:
            write_entry(
                entry,
                partial(read, teacher),
                batch_size=data.batch_size,
                device=module.device,
                own=lambda number: number % world_size == rank,
                progress=progress,
            )
    del teacher  # training needs its memory
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trainer.strategy.barrier("teacher_cache_parts")
    if trainer.is_global_zero:
        for entry in entries:
            entry.finish()
    trainer.strategy.barrier("teacher_cache_index")


def _announce(cached: CachedTeacher, is_new: bool) -> None:
    positions = sum(entry.layout.num_positions for entry in cached.entries)
    size = cached.record.itemsize
    names = " and ".join(str(entry.folder) for entry in cached.entries)
    rank_zero_info(
        f"teacher: {'written to' if is_new else 'read from'} its cache, {cached.k} ids a token, "
        f"{positions:,} tokens of {size} bytes ({names or 'nothing to keep'}); methods read their "
        f"divergences as TopK(., {cached.k}), at most the exact ones; validation takes these as "
        "val/top_k_*, and nothing of the teacher on on-policy samples"
    )
