"""Intervals in optimizer steps, independent of gradient accumulation."""

from __future__ import annotations

import math
import weakref

import lightning
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info

from okd_lightning.errors import ConfigError


class StepIntervals(Callback):
    """Callback that makes an integer ``trainer.val_check_interval`` count optimizer steps.

    These are counted over the whole run; Lightning counts micro-batches within an epoch.
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
        """Report a run without validation."""
        if not sum(trainer.num_val_batches):
            rank_zero_info("no validation: give --data.val for measures and a best checkpoint")
            return
        interval = getattr(trainer, "val_check_interval", None)  # may be an interval of time
        epoch = trainer.num_training_batches
        batches: float = trainer.max_steps * trainer.accumulate_grad_batches
        if batches < 0:  # no end in steps
            epochs = trainer.max_epochs if trainer.max_epochs is not None else -1
            batches = epoch * epochs if epochs >= 0 else math.inf
        is_within_epoch = interval == 1.0 and trainer.check_val_every_n_epoch == 1
        is_counted = isinstance(self._asked, int) and isinstance(interval, int)
        first = epoch if is_within_epoch else interval if is_counted else 0
        if first is not None and first > batches:
            step = first // trainer.accumulate_grad_batches
            rank_zero_info(
                f"no validation: the run ends before step {step}, its first one; give "
                "--trainer.val_check_interval STEPS below its length"
            )
