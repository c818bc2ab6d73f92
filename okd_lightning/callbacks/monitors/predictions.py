"""Output of ``predict``: one JSON line per prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info

from okd_lightning.data import RolloutDataModule
from okd_lightning.durable_files import own_aside, write_whole
from okd_lightning.records.batches import DistillBatch


class PredictionLog(Callback):
    """Writes ``predictions.jsonl`` in the run's folder (one file per rank if there are several)."""

    def __init__(self) -> None:
        self._records: list[dict[str, Any]] = []

    def on_predict_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: list[dict[str, Any]],
        batch: DistillBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Collect the records of a batch."""
        self._records += outputs

    def on_predict_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Write all records in the order of the dataset; an earlier file is kept until then.

        The ``prompt`` of a chat is the user's last message; images are shown by their names.

        Raises:
            OutputError: The file cannot be written.
        """
        suffix = f".rank{trainer.global_rank}" if trainer.world_size > 1 else ""
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        records = sorted(self._records, key=lambda record: record["index"])
        data = trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, RolloutDataModule):
            shown = {
                example.index: example.question
                for example in data.examples("predict").examples
                if example.chat is not None or example.images
            }
            for record in records:
                record["prompt"] = shown.get(record["index"], record["prompt"])
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        path = folder / f"predictions{suffix}.jsonl"
        write_whole(path, "".join(lines), own_aside(path))
        rank_zero_info(f"{len(records)} answers written to {path}")
        self._records = []
