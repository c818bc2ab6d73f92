"""All validations of a run, with the run's cost at each: the data of a comparison."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from okd_lightning.callbacks import Throughput
from okd_lightning.commands.reports.results import Point, RunResult
from okd_lightning.errors import ConfigError


class CurveLog(Callback):
    """Callback that keeps the ``val/*`` measures of a run, before the first step and after it.

    The one before is that of a ``trainer.validate`` before ``trainer.fit``. The state goes into
    checkpoints, so that a resumed run's curve has no gap. The Trainer needs a ``Throughput``, and
    has to call this callback before those that write checkpoints.

    Args:
        keeps: Whether to keep a measure, by name; all by default.
    """

    def __init__(self, keeps: Callable[[str], bool] = lambda name: True) -> None:
        self._keeps = keeps
        self.before: dict[str, float] | None = None
        self.points: list[Point] = []

    @property
    def last_step(self) -> int:
        """Step of the last validation; 0 before training."""
        return self.points[-1].step if self.points else 0

    def state_dict(self) -> dict[str, Any]:
        """Return all points."""
        return {"before": self.before, "points": [point.to_record() for point in self.points]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the curve."""
        self.before = state_dict["before"]
        self.points = [Point(**record) for record in state_dict["points"]]

    def on_validation_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Keep the measures; a second validation at one step replaces the first."""
        if trainer.sanity_checking:
            return
        measured = self._measured(trainer.callback_metrics)
        if trainer.global_step == 0:
            self.before = measured
            return
        if self.points and self.points[-1].step == trainer.global_step:
            self.points.pop()
        cost = throughput_of(trainer)
        self.points.append(
            Point(trainer.global_step, cost.tokens, cost.seconds, measured, cost.cpu_seconds)
        )

    def result(self, trainer: lightning.Trainer, method: str, seed: int | None = None) -> RunResult:
        """Return the run's result; to be called on all ranks.

        Raises:
            ConfigError: There was no validation before the first or after the last step.
        """
        if self.before is None or not self.points:
            raise ConfigError(
                "nothing was measured before and after this run: give --data.val, and no "
                "--trainer.limit_val_batches 0"
            )
        cost, strategy = throughput_of(trainer), trainer.strategy
        own = torch.tensor(cost.generated_tokens, device=strategy.root_device)
        written = cast(Tensor, strategy.reduce(own, reduce_op="sum"))  # each rank counts its own
        return RunResult(
            method=method,
            seconds=cost.seconds,
            cpu_seconds=cost.cpu_seconds,
            steps=trainer.global_step,
            tokens=cost.tokens,
            generated_tokens=int(written),
            before=self.before,
            after=self.points[-1].metrics,
            history=tuple(self.points),
            seed=seed,
        )

    def _measured(self, metrics: Mapping[str, Any]) -> dict[str, float]:
        kept = (n for n in sorted(metrics) if n.startswith("val/") and self._keeps(n))
        return {name: round(float(metrics[name]), 6) for name in kept}


def throughput_of(trainer: lightning.Trainer) -> Throughput:
    """Return the run's ``Throughput``."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return next(c for c in callbacks if isinstance(c, Throughput))
