"""What ``predict`` leaves behind: one JSON line a prompt."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import BasePredictionWriter


class PredictionLog(BasePredictionWriter):
    """Writes ``predictions.jsonl`` (one file a rank where there are several) in the run's folder."""

    def __init__(self) -> None:
        super().__init__(write_interval="epoch")

    def write_on_epoch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        predictions: Sequence[Any],
        batch_indices: Sequence[Any],
    ) -> None:
        """Write all records in the order of the data set."""
        records = sorted((r for batch in predictions for r in batch), key=lambda r: r["index"])
        suffix = f".rank{trainer.global_rank}" if trainer.world_size > 1 else ""
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"predictions{suffix}.jsonl"
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        path.write_text("".join(lines))
