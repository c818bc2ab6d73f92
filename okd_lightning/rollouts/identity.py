"""Identity of the rows of an optimizer step, for the check of a checkpoint at a resume."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from okd_lightning.errors import ConfigError
from okd_lightning.records.batches import Example
from okd_lightning.rollouts.loader_shape import LoaderShape


def rows_identity(examples: Sequence[Example], shape: LoaderShape, seed: int) -> list[int]:
    """Return numbers that determine the order of prompts: equal lists mean equal batches."""
    read: list[Any] = [(e.prompt_ids, e.teacher_prompt_ids) for e in examples]
    read += [e.teacher for e in examples if e.teacher >= 0]
    read += [(e.index, i.sha256) for e in examples for i in (*e.images, *e.teacher_images)]
    prompts = zlib.crc32(repr(read).encode())
    cut = [shape.prompts_per_epoch, shape.steps_per_rollout, shape.samples_per_prompt]
    return [seed, len(examples), prompts, *cut]


def check_same_rows(state: Mapping[str, Any], own: Mapping[str, Any], shape: LoaderShape) -> None:
    """Refuse a checkpoint of other steps or prompts.

    Args:
        state: ``rows_per_step`` and ``identity`` of the checkpoint.
        own: The same of this run.
        shape: Division of this run's epoch.

    Raises:
        ConfigError: The number of rows of an optimizer step, prompts, seed or rollout batches
            differ.
    """
    if state["rows_per_step"] != own["rows_per_step"]:
        raise ConfigError(
            f"this run has {own['rows_per_step']} rows per optimizer step (batch_size x "
            f"accumulation x ranks), the checkpoint was written with {state['rows_per_step']}; "
            f"{_advice(state['rows_per_step'], shape)}"
        )
    if state["identity"] != own["identity"]:
        raise ConfigError(
            "this run's prompts, images, teacher prompts, seed, prompts_per_epoch, "
            "prompts_per_rollout or samples_per_prompt differ from the checkpoint's; resume with "
            "the same, or start a new run from the exported student: --model.student FOLDER"
        )


def _advice(rows: int, shape: LoaderShape) -> str:
    """Return the options with which an optimizer step has ``rows`` rows."""
    ranks = shape.world_size
    if rows % ranks:
        return f"resume on a number of ranks that divides {rows}"
    batch_size = math.gcd(shape.batch_size, rows // ranks)
    return (
        f"set --data.global_batch_size {rows} --data.batch_size {batch_size} "
        f"--trainer.accumulate_grad_batches {rows // (batch_size * ranks)}"
    )
