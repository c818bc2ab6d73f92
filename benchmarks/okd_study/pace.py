"""CPU seconds a step, measured side by side in one process."""

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
    """CPU time at the end of every step; between two of them lie rollouts, data and update."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *_: Any
    ) -> None:
        """Look at the clock."""
        self.marks.append(time.process_time())

    @property
    def seconds_a_step(self) -> float:
        """Mean over the counted steps: rows differ in length."""
        counted = self.marks[_UNCOUNTED:]
        return (counted[-1] - counted[0]) / (len(counted) - 1)


def seconds_a_step(tasks: Tasks, task: str, names: Iterable[str]) -> dict[str, float]:
    """Median over interleaved short runs from the same start, on the same rows."""
    rounds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(_ROUNDS):
        for name, found in rounds.items():
            arm = Arm(task, name, METHODS[name], _STEPS, seed=0)
            prepared, times = tasks.prepare(arm), _StepTimes()
            method = arm.method(prepared.module.learning_rate)
            trainer = tasks.trainer(_STEPS, [method, times], limit_val_batches=0)
            trainer.fit(prepared.module, prepared.data)
            found.append(times.seconds_a_step)
    return {name: round(statistics.median(found), 5) for name, found in rounds.items()}
