"""Complete optimizer steps: their micro-batches, and checks of Trainer settings that cut them."""

from __future__ import annotations

import lightning
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities import rank_zero_info

from okd_lightning.errors import ConfigError
from okd_lightning.rollouts import LoaderShape, StagedPlan


def _accumulation_for(
    global_batch_size: int, batch_size: int, world_size: int, configured: int
) -> int:
    """Return the micro-batches of an optimizer step with ``global_batch_size`` rows.

    Raises:
        ConfigError: It is not a multiple of the micro-batches' rows, or contradicts the
            accumulation.
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
    trainer: lightning.Trainer,
    batch_size: int,
    global_batch_size: int | None,
    samples_per_prompt: int = 1,
) -> None:
    """Set the accumulation; refuse settings that end an epoch inside an optimizer step.

    Args:
        trainer: The run's Trainer.
        batch_size: Rows of a micro-batch.
        global_batch_size: Rows of an optimizer step; None to use the Trainer's accumulation.
        samples_per_prompt: Responses to each prompt, one per row.

    Raises:
        ConfigError: A setting is refused; the message says what to use.
    """
    if global_batch_size is not None:
        trainer.accumulate_grad_batches = _accumulation_for(
            global_batch_size, batch_size, trainer.world_size, trainer.accumulate_grad_batches
        )
    accumulate, limit = trainer.accumulate_grad_batches, trainer.limit_train_batches
    if accumulate < 1:
        raise ConfigError(f"trainer.accumulate_grad_batches must be at least 1, got {accumulate}")
    if not limit:
        raise ConfigError(
            "trainer.limit_train_batches 0 trains on no rows; leave it out, or use validate or test"
        )
    if every := getattr(trainer, "reload_dataloaders_every_n_epochs", 0):
        raise ConfigError(
            f"trainer.reload_dataloaders_every_n_epochs {every} would lose the place in the data "
            "at a resume, and the loader generates new responses every epoch; leave it out"
        )
    for name in ("min_epochs", "min_steps"):
        if (least := getattr(trainer, name, None)) is not None and least < 0:
            raise ConfigError(f"trainer.{name} must not be negative, got {least}")
    prompts_per_step = max(1, accumulate * batch_size * trainer.world_size // samples_per_prompt)
    if trainer.overfit_batches:  # type: ignore[attr-defined]
        raise ConfigError(_no_overfitting(trainer, prompts_per_step))
    if isinstance(limit, int) and limit % accumulate and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        prompts = -(-limit // accumulate) * prompts_per_step
        raise ConfigError(
            f"trainer.limit_train_batches {limit} is not a multiple of "
            f"trainer.accumulate_grad_batches {accumulate}, so that an epoch would end within an "
            "optimizer step; leave it out and "
            f"give --data.prompts_per_epoch {prompts}"
        )
    if any(isinstance(c, GradientAccumulationScheduler) for c in trainer.callbacks):  # type: ignore[attr-defined]
        raise ConfigError(
            "GradientAccumulationScheduler changes the rows of an optimizer step during a run; "
            "use --trainer.accumulate_grad_batches or --data.global_batch_size"
        )


def _no_overfitting(trainer: lightning.Trainer, prompts_per_step: int) -> str:
    """Return the error about overfit_batches, with the alternative."""
    batches = trainer.overfit_batches  # type: ignore[attr-defined]
    refused = f"trainer.overfit_batches {batches} would train and measure on the same few batches"
    if not isinstance(batches, int):
        return (
            f"{refused}; leave it out, and give --data.train and --data.val one file of the rows "
            "that you mean"
        )
    prompts = -(-batches // trainer.accumulate_grad_batches) * prompts_per_step
    return (
        f"{refused}; leave it out and give --data.prompts_per_epoch {prompts}, which shortens an "
        f"epoch; to see the same rows again and again, give --data.train a file of these {prompts}"
    )


def check_limit(trainer: lightning.Trainer, shape: LoaderShape, num_batches: int) -> None:
    """Refuse a limit whose epochs would not end together with the loader's.

    The rest of a cut epoch is used in the Trainer's next epoch.

    Args:
        trainer: The run's Trainer.
        shape: Division of an epoch.
        num_batches: Micro-batches of an epoch.

    Raises:
        ConfigError: The limit is refused; the message says what to use.
    """
    limit = trainer.limit_train_batches
    batches = limit if isinstance(limit, int) else int(limit * num_batches)
    is_cut = limit > 0 and batches < num_batches and not trainer.fast_dev_run  # type: ignore[attr-defined]
    if is_cut and (not isinstance(limit, int) or num_batches % batches):
        steps = max(1, batches // shape.accumulate_grad_batches)
        raise ConfigError(
            f"trainer.limit_train_batches {limit} cuts the {num_batches} micro-batches of an epoch "
            "into parts that do not fit it; leave it out and give --data.prompts_per_epoch "
            f"{steps * shape.prompts_per_step}"
        )


def announce(plan: StagedPlan, shape: LoaderShape) -> None:
    """Log the steps of an epoch and the sources of its rows."""
    rank_zero_info(
        f"an epoch is {shape.steps_per_epoch} optimizer steps of {shape.rows_per_step} rows; "
        + ", ".join(
            (f"from step {start} on " if start else "the student generates ")
            + f"{part.share(start):.0%}"
            + ("" if start else " of them")
            + ("" if part.share_at is None else " at first")
            for start, part in plan.stages
        )
    )
