"""Equal budget for every run of a comparison."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast, get_args

import lightning
import torch
from lightning.pytorch.callbacks import Callback

from okd_lightning.commands.reports.curve_log import throughput_of
from okd_lightning.errors import UsageError
from okd_lightning.records.batches import DistillBatch

Unit: TypeAlias = Literal["steps", "tokens", "seconds", "cpu_seconds"]
"""Optimizer steps; loss tokens trained on; seconds, or CPU seconds, of training and rollouts.

Seconds are those of the clock: contenders on a busy machine get unequal shares of it. CPU seconds
are of the process that trains (``Throughput.cpu_seconds``) and do not depend on other jobs.
"""


@dataclass(frozen=True)
class Budget:
    """Budget of one run.

    Attributes:
        unit: The counted unit.
        amount: Number of units, above 0.
    """

    unit: Unit
    amount: float

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Parse ``steps=200``, ``tokens=1e6``, ``seconds=600`` or ``cpu_seconds=600``.

        Raises:
            UsageError: Anything else.
        """
        unit, _, amount = text.partition("=")
        try:
            number = float(amount)
        except ValueError:
            number = math.nan
        is_known = unit in get_args(Unit) and math.isfinite(number) and number > 0
        if not is_known or (not unit.endswith("seconds") and number != int(number)):
            raise UsageError(
                f"--budget {text!r}: expected steps=N, tokens=N, seconds=N or cpu_seconds=N with "
                "N above 0, such as --budget steps=200"
            )
        return cls(cast(Unit, unit), number)

    def __str__(self) -> str:
        return f"{self.unit}={self.amount:.15g}"

    @property
    def options(self) -> list[str]:
        """The Trainer's limits for this budget; the end of an epoch does not end the run.

        A schedule knows a limit in steps. Limits in tokens and seconds are applied by BudgetStop.
        """
        steps = int(self.amount) if self.unit == "steps" else -1
        return ["--trainer.max_steps", str(steps), "--trainer.max_epochs", "-1"]

    def refusal(self, device: torch.device, servers: Sequence[str]) -> str | None:
        """Return why this budget would not be equal for runs that compute elsewhere; None if it is.

        Args:
            device: Where the models are.
            servers: Options whose models another program computes.
        """
        if self.unit != "cpu_seconds" or (device.type == "cpu" and not servers):
            return None
        others = " and ".join(servers) or f"the {device.type} device"
        return (
            f"--budget {self} counts CPU seconds of the process that trains, which do not include "
            f"those of {others}: give --budget seconds=N, on a machine without other jobs"
        )

    def is_spent(self, trainer: lightning.Trainer) -> bool:
        """Return whether a run has used the budget up, by its ``Throughput``."""
        if self.unit == "steps":
            return trainer.global_step >= self.amount
        return bool(getattr(throughput_of(trainer), self.unit) >= self.amount)


class BudgetStop(Callback):
    """Callback that ends a run after the step that uses up its budget, on all ranks alike.

    Has to be called after the ``Throughput`` that counts. A run that is resumed after its budget
    was spent ends at once.

    Args:
        budget: The run's budget.
    """

    def __init__(self, budget: Budget) -> None:
        self.budget = budget

    def on_train_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Stop a resumed run that has no budget left."""
        self._stop_if_spent(trainer)

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: DistillBatch,
        batch_idx: int,
    ) -> None:
        """Check the counters when an optimizer step is done."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self._stop_if_spent(trainer)

    def _stop_if_spent(self, trainer: lightning.Trainer) -> None:
        is_spent = self.budget.is_spent(trainer)
        if trainer.strategy.reduce_boolean_decision(is_spent, all=False):
            trainer.should_stop = True
