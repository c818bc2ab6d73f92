"""Measures of validation and test, equal in every run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from torch import nn
from torchmetrics import Metric

from okd_lightning.losses import DrawnLogProb, Measured, Quantity
from okd_lightning.metrics import measure_metrics
from okd_lightning.records.batches import SOURCES, DistillBatch
from okd_lightning.training.distilled_run import DistilledRun


class Evaluation(nn.ModuleDict):
    """Metric name → mean over a data set; a DistillationModule registers it as ``evaluation``."""

    def __init__(self) -> None:
        super().__init__(dict(measure_metrics().items()))

    def reset(self) -> None:
        """Reset in this loop's mode: inference tensors cannot be updated outside inference mode."""
        for metric in self.values():
            cast(Metric, metric).reset()

    def update_from(self, run: DistilledRun, stage: str, batch: DistillBatch) -> None:
        """Measure divergences to the base teacher at temperature 1, in nats per token, and log.

        Args:
            run: The module.
            stage: "val" or "test".
            batch: Rows of one source.
        """
        is_own = SOURCES[int(batch.source[0])] == "student"
        for context, wanted in run.pair.teacher.measurements(stage, is_own):
            with context:
                self._update(run, wanted, run.measure(batch, tuple(wanted.values())))

    def _update(
        self, run: DistilledRun, wanted: Mapping[str, Quantity], measured: Measured
    ) -> None:
        for name, quantity in wanted.items():
            values = measured[quantity]
            metric = cast(Metric, self[name])
            metric.update(-values if isinstance(quantity, DrawnLogProb) else values)
            run.log(name, metric, on_epoch=True, add_dataloader_idx=False, batch_size=1)
