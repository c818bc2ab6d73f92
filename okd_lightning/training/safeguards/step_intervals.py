"""Validation: intervals in optimizer steps, and after the last step of a short run."""

from __future__ import annotations

import math
import weakref

import lightning
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info

from okd_lightning.errors import ConfigError
from okd_lightning.training.lightning_privates import release
from okd_lightning.training.loop_state import has_validation, has_validation_data


class StepIntervals(Callback):
    """Callback that makes an integer ``trainer.val_check_interval`` count optimizer steps.

    These are counted over the whole run; Lightning counts micro-batches within an epoch. A run that
    ends within its first epoch is validated after its last step, if no interval is given. A run
    that was stopped in the validation after its last step is validated when it is resumed.
    """

    precedes_models: bool = True  # a wrong interval is refused before models are built

    def __init__(self) -> None:
        self._asked: int | None = None
        self._trainer: weakref.ref[lightning.Trainer] | None = None

    def setup(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str
    ) -> None:
        """Convert the interval, after the data module has settled the accumulation.

        Raises:
            ConfigError: An interval below 1.
        """
        release(trainer)  # a fit that failed has left it held
        interval = getattr(trainer, "val_check_interval", None)  # may be an interval of time
        if isinstance(interval, int) and interval < 1:
            raise ConfigError(
                f"trainer.val_check_interval must be at least 1 optimizer step, got {interval}"
            )
        if stage == "fit" and isinstance(interval, int) and not isinstance(interval, bool):
            if self._trainer is None or self._trainer() is not trainer:
                self._asked, self._trainer = interval, weakref.ref(trainer)
            assert self._asked is not None  # a second fit finds the converted interval
            trainer.val_check_interval = self._asked * trainer.accumulate_grad_batches
            trainer.check_val_every_n_epoch = None  # so Lightning counts across epochs

    def on_train_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Place the validation of a run within its first epoch; report a run without validation."""
        if not sum(trainer.num_val_batches):
            release(trainer)  # a resume whose options leave out the validation that was due
        if not has_validation(trainer):
            is_off = trainer.limit_val_batches == 0 and has_validation_data(trainer)
            todo = "leave --trainer.limit_val_batches 0 out" if is_off else "give --data.val"
            rank_zero_info(f"no validation: {todo} for measures and a best checkpoint")
            return
        epoch, batches = trainer.num_training_batches, _batches_of_run(trainer)
        if _validates_each_epoch(trainer) and math.isfinite(epoch):
            # a second fit of a Trainer begins in a later epoch, and finds the value of the first
            trainer.val_check_batch = int(epoch if trainer.current_epoch else min(epoch, batches))
        step = _first_validation(trainer) / trainer.accumulate_grad_batches
        if step > batches / trainer.accumulate_grad_batches:
            rank_zero_info(
                f"no validation: the run ends before step {math.ceil(step)}, its first one; give "
                "--trainer.val_check_interval STEPS below its length"
            )

    def on_validation_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """End a resumed run whose last validation was due."""
        release(trainer)


def _validates_each_epoch(trainer: lightning.Trainer) -> bool:
    """Return whether the intervals are Lightning's defaults: after every epoch."""
    interval = getattr(trainer, "val_check_interval", None)  # None where it is one of time
    return interval == 1.0 and trainer.check_val_every_n_epoch == 1


def _batches_of_run(trainer: lightning.Trainer) -> float:
    """Return the micro-batches up to the run's end; inf where only time ends it."""
    if trainer.max_steps >= 0:
        return trainer.max_steps * trainer.accumulate_grad_batches
    if trainer.max_epochs is None or trainer.max_epochs < 0:
        return math.inf
    return trainer.num_training_batches * trainer.max_epochs


def _first_validation(trainer: lightning.Trainer) -> float:
    """Return the micro-batches before the first validation; 0 where it depends on the clock."""
    batch, epochs = trainer.val_check_batch, trainer.check_val_every_n_epoch
    if batch is None or math.isinf(batch):
        return 0
    return trainer.num_training_batches * ((epochs or 1) - 1) + batch
