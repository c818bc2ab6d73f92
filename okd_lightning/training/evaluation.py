"""Measures of validation and test, equal in every run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

from torch import Tensor, nn
from torchmetrics import Metric

from okd_lightning.losses import DrawnLogProb, Measured, Quantity
from okd_lightning.metrics import measure_metrics
from okd_lightning.records.batches import SOURCES, DistillBatch
from okd_lightning.training.distilled_run import DistilledRun


class Evaluation(nn.ModuleDict):
    """Metric name → mean over a data set; a DistillationModule registers it as ``evaluation``.

    Args:
        num_teachers: Teachers that rows choose from, each with means of its own.
    """

    def __init__(self, num_teachers: int = 0) -> None:
        super().__init__(dict(measure_metrics(num_teachers).items()))

    def reset(self) -> None:
        """Reset in the loop's mode: inference tensors cannot be updated outside inference mode."""
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
                measured = run.measure(batch, tuple(wanted.values()))
                self._update(run, wanted, measured, batch.teachers_present or ())

    def _update(
        self,
        run: DistilledRun,
        wanted: Mapping[str, Quantity],
        measured: Measured,
        teachers: Sequence[int],
    ) -> None:
        names = run.pair.teacher.names
        for name, quantity in wanted.items():
            values = measured[quantity]
            values = -values if isinstance(quantity, DrawnLogProb) else values
            self._add(run, name, name, values)
            for number in teachers:
                assert measured.teacher is not None
                own = values[measured.teacher == number]
                self._add(run, f"{name}/{number}", f"{name}/{names[number]}", own)

    def _add(self, run: DistilledRun, key: str, name: str, values: Tensor) -> None:
        """Add values to a measure, and log it; all ranks call this, also without values."""
        metric = cast(Metric, self[key])
        metric.update(values)
        run.log(name, metric, on_epoch=True, add_dataloader_idx=False, batch_size=1)
