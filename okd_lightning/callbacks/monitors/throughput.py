"""Where the time goes: tokens trained on and written, and the seconds of either."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import lightning
from lightning.pytorch.callbacks import Callback

from okd_lightning.records.batches import DistillBatch
from okd_lightning.training.pair_module import PairModule


class Throughput(Callback):
    """Counts loss tokens and generated tokens, and the seconds of training and rollouts.

    Validation, sample tables, imports and set-up are not counted. Logs ``train/tokens_per_second``,
    ``train/tokens`` and ``train/seconds`` with the training metrics, and
    ``train/wasted_positions``: the share of the positions of a step's forward passes, on this rank,
    that the student computes without a token on them.

    Attributes:
        tokens: Loss tokens trained on, over all ranks.
        generated_tokens: Tokens written by either model, on this rank.
        seconds: Training and rollouts together.
        rollout_seconds: Rollouts alone.
        cpu_seconds: What this process has spent of the CPU's time meanwhile, over all its threads:
            what other jobs on the machine do not change.
    """

    def __init__(self) -> None:
        self._start_anew()

    def _start_anew(self) -> None:
        self.tokens = 0
        self.generated_tokens = 0
        self.seconds = 0.0
        self.rollout_seconds = 0.0
        self.cpu_seconds = 0.0
        self._mark: tuple[float, float] | None = None
        self._step_tokens = self._step_positions = 0  # of what the student has read in this step

    def state_dict(self) -> dict[str, Any]:
        """All counters."""
        names = ("tokens", "generated_tokens", "seconds", "rollout_seconds", "cpu_seconds")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the counters."""
        vars(self).update(state_dict)

    def setup(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str
    ) -> None:
        """Count anew in a new run; what a resumed one has counted is loaded behind this."""
        if stage == "fit" and trainer.global_step == 0:
            self._start_anew()

    def on_train_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Start the clock."""
        self._mark = _now()

    def on_train_batch_start(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        batch: DistillBatch,
        batch_idx: int,
    ) -> None:
        """Count what was written for this batch."""
        self.generated_tokens += int(batch.metrics.get("rollout/tokens", 0))
        self.rollout_seconds += batch.metrics.get("rollout/seconds", 0.0)

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: DistillBatch,
        batch_idx: int,
    ) -> None:
        """Count a step's tokens once, at its last micro-batch, and the time since the last."""
        self._tick()
        read = batch.student_reads
        self._step_tokens += read.num_tokens
        self._step_positions += read.num_positions(cast(PairModule, pl_module).packs_student)
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0 and batch.step_counts:
            self.tokens += sum(batch.step_counts)
            training = max(self.seconds - self.rollout_seconds, 1e-9)
            pl_module.log_dict(
                {
                    "train/tokens": float(self.tokens),
                    "train/seconds": self.seconds,
                    "train/tokens_per_second": self.tokens / training,
                    "train/wasted_positions": 1.0 - self._step_tokens / self._step_positions,
                },
                batch_size=1,
            )
            self._step_tokens = self._step_positions = 0

    def on_validation_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Stop the clock."""
        self._tick()
        self._mark = None

    def on_validation_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Start it again (``trainer.training`` is still False here)."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._mark = _now()

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Within it the clock stands still: for what is no part of training."""
        is_running = self._mark is not None
        self._tick()
        self._mark = None
        try:
            yield
        finally:
            self._mark = _now() if is_running else None

    def _tick(self) -> None:
        now = _now()
        if self._mark is not None:
            self.seconds += now[0] - self._mark[0]
            self.cpu_seconds += now[1] - self._mark[1]
        self._mark = now


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()
