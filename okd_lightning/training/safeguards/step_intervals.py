"""Intervals in optimizer steps, independent of gradient accumulation."""

from __future__ import annotations

import weakref

import lightning
from lightning.pytorch.callbacks import Callback

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
