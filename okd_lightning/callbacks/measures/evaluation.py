"""Base of callbacks that log metrics after validation and test, besides the module's metrics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback

from okd_lightning.errors import ConfigError


class EvaluationCallback(Callback, ABC):
    """Calls ``_log`` with "val" or "test" at the end of such an epoch; not in sanity checks.

    Attributes:
        measured: Names of the logged metrics, without ``val/`` and ``test/``.
        precedes_models: Its ``setup`` runs before the models are built.
        generates: It may make the student generate responses.
    """

    measured: tuple[str, ...] = ()
    precedes_models: bool = True
    generates: bool = True

    def setup(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str
    ) -> None:
        """Refuse a second callback with the same metrics: Lightning would log the mean of both.

        Raises:
            ConfigError: Two callbacks log a metric of the same name.
        """
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if other is self or not isinstance(other, EvaluationCallback):
                continue
            both = sorted({*self.measured} & {*other.measured})
            if both:
                raise ConfigError(
                    f"{type(self).__name__} and {type(other).__name__} in trainer.callbacks both "
                    f"measure {', '.join(both)}: leave one of them out (a TaskScore takes a name)"
                )

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
