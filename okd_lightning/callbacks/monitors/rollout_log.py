"""Log of sampled training responses on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback

from okd_lightning.errors import ConfigError
from okd_lightning.records.batches import SOURCES, DistillBatch
from okd_lightning.records.generations import response_record
from okd_lightning.training.module import DistillationModule


class RolloutLog(Callback):
    """Appends a few generated responses to ``rollouts.jsonl`` of the run's folder.

    The records have the kind "rollout"; those of ``SampleTable`` have the kind "sample".

    Args:
        every_n_steps: Optimizer steps between two samples.
        num_rows: Rows per sample.

    Raises:
        ConfigError: Either is below 1.
    """

    def __init__(self, every_n_steps: int = 50, num_rows: int = 4) -> None:
        for name, value in (("every_n_steps", every_n_steps), ("num_rows", num_rows)):
            if value < 1:
                raise ConfigError(f"RolloutLog: {name} must be at least 1, got {value}")
        self.every_n_steps = every_n_steps
        self.num_rows = num_rows
        self._next_step = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the step of the next sample."""
        return {"next_step": self._next_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the interval of the interrupted run."""
        self._next_step = state_dict["next_step"]

    def on_train_batch_start(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        batch: DistillBatch,
        batch_idx: int,
    ) -> None:
        """Write the first generated rows of a batch at the interval."""
        assert isinstance(pl_module, DistillationModule)
        sources = [SOURCES[code] for code in batch.source.tolist()]
        rows = [i for i, source in enumerate(sources) if source != "dataset"]
        if trainer.global_step < self._next_step or not rows or not trainer.is_global_zero:
            return
        self._next_step = trainer.global_step + self.every_n_steps
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "rollouts.jsonl").open("a", encoding="utf-8") as file:
            for i in rows[: self.num_rows]:
                record = {
                    "step": trainer.global_step,
                    "kind": "rollout",
                    "source": sources[i],
                    **response_record(batch, i, pl_module.decode),
                }
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
