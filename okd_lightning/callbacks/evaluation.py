"""What measures at the end of every validation and test, beside the module's own measures."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback


class EvaluationCallback(Callback, ABC):
    """Calls ``_log`` with "val" or "test" when an epoch of either ends; not in sanity checks."""

    def on_validation_epoch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Measure and log."""
        if not trainer.sanity_checking:
            self._log(trainer, pl_module, "val")

    def on_test_epoch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Measure and log."""
        self._log(trainer, pl_module, "test")

    @abstractmethod
    def _log(self, trainer: lightning.Trainer, pl_module: Any, part: str) -> None:
        """Measure one part and log it under its name."""
