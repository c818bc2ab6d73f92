"""Base of callbacks that log metrics after validation and test, besides the module's metrics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
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
        """Refuse metrics that something else in the run logs under the same names.

        Raises:
            ConfigError: Another callback, or the run itself, logs a metric of the same name.
        """
        self.check_names(trainer, pl_module, self.measured)

    def check_names(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, names: Sequence[str]
    ) -> None:
        """Refuse names that another callback measures, or the run: one would hide the other.

        Args:
            trainer: The run's Trainer.
            module: The run's module.
            names: Names of this callback's metrics, without ``val/`` and ``test/``.

        Raises:
            ConfigError: There is such a name.
        """
        own = type(self).__name__
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if other is self or not isinstance(other, EvaluationCallback):
                continue
            both = sorted({*names} & {*other.measured})
            if both:
                raise ConfigError(
                    f"{own} and {type(other).__name__} in trainer.callbacks both measure "
                    f"{', '.join(both)}: leave one of them out, or give a TaskScore another name"
                )
        logged = getattr(module, "evaluation", ())
        both = sorted(name for name in names if f"val/{name}" in logged)
        if both:
            raise ConfigError(
                f"{own} in trainer.callbacks would log val/{both[0]}, which every run logs itself: "
                "leave it out, or give a TaskScore another name"
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
