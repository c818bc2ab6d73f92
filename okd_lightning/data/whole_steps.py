"""Optimizer steps are whole: how many micro-batches make one, what would cut one, what is said."""

from __future__ import annotations

import lightning
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities import rank_zero_info

from okd_lightning.errors import ConfigError
from okd_lightning.rollouts import LoaderShape, StagedPlan


def _accumulation_for(
    global_batch_size: int, batch_size: int, world_size: int, configured: int
) -> int:
    """Micro-batches an optimizer step, so that it has ``global_batch_size`` rows.

    Raises:
        ConfigError: The rows cannot be cut so, or the accumulation was set to something else.
    """
    rows = batch_size * world_size
    if global_batch_size % rows:
        raise ConfigError(
            f"data.global_batch_size {global_batch_size} is not a multiple of batch_size x devices "
            f"= {batch_size} x {world_size} = {rows}; change one of them"
        )
    accumulation = global_batch_size // rows
    if configured not in (1, accumulation):
        raise ConfigError(
            f"trainer.accumulate_grad_batches {configured} contradicts data.global_batch_size "
            f"{global_batch_size}, which needs {accumulation}; leave one of them out"
        )
    return accumulation


def settle_steps(
    trainer: lightning.Trainer, batch_size: int, global_batch_size: int | None
) -> None:
    """Set the accumulation; refuse what would cut an epoch where a step is not complete.

    Args:
        trainer: Of the run.
        batch_size: Rows of a micro-batch.
        global_batch_size: Rows of an optimizer step; None: the Trainer's accumulation decides.

    Raises:
        ConfigError: Naming what to use.
    """
    if global_batch_size is not None:
        trainer.accumulate_grad_batches = _accumulation_for(
            global_batch_size, batch_size, trainer.world_size, trainer.accumulate_grad_batches
        )
    accumulate, limit = trainer.accumulate_grad_batches, trainer.limit_train_batches
    if accumulate < 1:
        raise ConfigError(f"trainer.accumulate_grad_batches must be at least 1, got {accumulate}")
    is_whole = limit % accumulate == 0 if isinstance(limit, int) else limit == 1.0
    if trainer.overfit_batches or not (is_whole or trainer.fast_dev_run):  # type: ignore[attr-defined]
        raise ConfigError(
            "trainer.limit_train_batches and trainer.overfit_batches cut an epoch where its rows "
            "were not dealt; shorten it with --data.prompts_per_epoch (or whole multiples of the "
            "accumulation)"
        )
    if any(isinstance(c, GradientAccumulationScheduler) for c in trainer.callbacks):  # type: ignore[attr-defined]
        raise ConfigError(
            "GradientAccumulationScheduler changes the rows of an optimizer step during a run; "
            "use --trainer.accumulate_grad_batches or --data.global_batch_size"
        )


def check_limit(trainer: lightning.Trainer, num_batches: int) -> None:
    """Refuse a limit whose epochs would not end together with the loader's.

    An epoch that was cut goes on in the next one.

    Args:
        trainer: Of the run.
        num_batches: Micro-batches of an epoch.

    Raises:
        ConfigError: Naming the limit and what to use.
    """
    limit = trainer.limit_train_batches
    is_cut = isinstance(limit, int) and 0 < limit < num_batches
    if is_cut and num_batches % limit and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        raise ConfigError(
            f"trainer.limit_train_batches {limit} does not divide the {num_batches} micro-batches "
            "of an epoch; shorten epochs with --data.prompts_per_epoch"
        )


def announce(plan: StagedPlan, shape: LoaderShape) -> None:
    """Say what an epoch is and who writes its rows."""
    rank_zero_info(
        f"an epoch is {shape.steps_per_epoch} optimizer steps of {shape.rows_per_step} rows; "
        + ", ".join(
            (f"from step {start} on " if start else "the student writes ")
            + f"{part.share(start):.0%}"
            + ("" if start else " of them")
            + ("" if part.share_at is None else " at first")
            for start, part in plan.stages
        )
    )
