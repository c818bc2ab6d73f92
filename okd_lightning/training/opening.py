"""Messages and checks at the start of training: trained parameters and the teacher's place."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import lightning
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from okd_lightning.data import RolloutDataModule
from okd_lightning.data.progress import rollout_progress
from okd_lightning.errors import ConfigError
from okd_lightning.losses import Term
from okd_lightning.records.batches import Example
from okd_lightning.teachers import Opening
from okd_lightning.training.distilled_run import DistilledRun


def open_run(module: DistilledRun) -> None:
    """Report the trained parameters, warn of updates lost to rounding, and open the teacher.

    Args:
        module: A module inside a Trainer, with its models on their devices.

    Raises:
        OKDLightningError: The teacher cannot serve this run.
    """
    own = () if module.student is None else (module.student,)
    for name, models in (("student", own), ("teacher", module.pair.teacher.models)):
        if models:
            sizes = [(p.numel(), p.requires_grad) for one in models for p in one.parameters()]
            total, trained = sum(n for n, _ in sizes), sum(n for n, t in sizes if t)
            rank_zero_info(f"{name}: {total:,} parameters, {trained:,} trained")
    rank_zero_info(module.pair.ends.described(module.pair.tokenizer))
    if module.pair.dtype == "bfloat16" and module.pair.student_adapter is None:
        rank_zero_warn(
            "the student's own weights are bfloat16, which keeps 8 bits of each: steps of a "
            f"small learning rate (here {module.learning_rate:g}) mostly round to nothing; give "
            "--model.dtype float32 with --trainer.precision bf16-mixed, or a student_adapter"
        )
    trainer, terms = module.trainer, module.terms
    if trainer.precision == "bf16-mixed" and module.device.type == "cpu" and not _has_amx():
        rank_zero_info(
            "bf16-mixed is slower than float32 on this processor, which has no matrix unit for "
            "bfloat16 (AMX): leave --trainer.precision out, unless you need bfloat16's rounding"
        )
    module.pair.teacher.open(
        Opening(
            trainer, terms, module.device, partial(_read_rows, trainer, terms), rollout_progress
        )
    )


def _has_amx() -> bool:
    return torch.cpu._is_amx_tile_supported()


def _read_rows(
    trainer: lightning.Trainer, terms: Sequence[Term], option: str
) -> tuple[list[Sequence[Example]], int]:
    """Return the dataset responses for which training and validation need the teacher."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(data, RolloutDataModule):
        raise ConfigError(
            f"{option} reads its rows from a RolloutDataModule: train on one, or give "
            "--model.teacher a folder or hub id"
        )
    sets: list[Sequence[Example]] = []
    if any(q.needs_teacher for term in terms for q in term.quantities):
        sets.append(data.examples("train", needs_response=True).examples)
    if data.sources["val"] is not None and trainer.limit_val_batches:
        sets.append([e for e in data.examples("val").examples if e.response_ids])
    return [examples for examples in sets if examples], data.batch_size
