"""CPU seconds per step, measured side by side in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback

from okd_study.arms import METHODS, Arm
from okd_study.tasks import Tasks

_ROUNDS, _STEPS, _UNCOUNTED = 5, 14, 4


class _StepTimes(Callback):
    """CPU time at the end of every step; an interval covers rollouts, data and update."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *_: Any
    ) -> None:
        """Record the CPU time."""
        self.marks.append(time.process_time())

    @property
    def seconds_a_step(self) -> float:
        """Mean over the counted steps, because rows differ in length."""
        counted = self.marks[_UNCOUNTED:]
        return (counted[-1] - counted[0]) / (len(counted) - 1)


def measure_rounds(tasks: Tasks, task: str, names: Iterable[str]) -> dict[str, list[float]]:
    """Return CPU seconds per step of interleaved short runs with the same start and rows."""
    rounds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(_ROUNDS):
        for name, found in rounds.items():
            arm = Arm(task, name, METHODS[name], _STEPS, seed=0)
            prepared, times = tasks.prepare(arm), _StepTimes()
            method = arm.method(prepared.module.learning_rate)
            trainer = tasks.trainer(_STEPS, [method, times], limit_val_batches=0)
            trainer.fit(prepared.module, prepared.data)
            found.append(round(times.seconds_a_step, 5))
    return rounds


def relative_seconds(rounds: dict[str, list[float]], reference: str) -> dict[str, float]:
    """Return seconds per step over ``reference``'s: the median of the ratios per round."""
    return {
        name: statistics.median(
            own / base for own, base in zip(found, rounds[reference], strict=True)
        )
        for name, found in rounds.items()
    }
