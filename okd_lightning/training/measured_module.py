"""The MeasuredModule: measures of validation, test and predict, equal in every run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import Tensor
from torchmetrics import Metric

from okd_lightning.losses import DrawnLogProb, Measured, Quantity
from okd_lightning.metrics import measure_metrics
from okd_lightning.records.batches import SOURCES, DistillBatch
from okd_lightning.records.rows import generation_records
from okd_lightning.training.loop_state import count_steps
from okd_lightning.training.paired_module import PairedModule


class MeasuredModule(PairedModule):
    """A pair that is compared on validation and test data; the arguments are PairedModule's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._loaded_step = 0
        self.evaluation = measure_metrics(len(self.teacher_names))

    def validation_step(self, batch: DistillBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Measure divergences to the base teacher at temperature 1, in nats per token."""
        self._evaluate("val", batch, dataloader_idx)

    def test_step(self, batch: DistillBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Compute the measures of validation on the test set."""
        self._evaluate("test", batch, dataloader_idx)

    def on_validation_epoch_start(self) -> None:
        """Reset the measures."""
        self._reset_measures()

    def on_test_epoch_start(self) -> None:
        """Reset the measures."""
        self._reset_measures()

    def _reset_measures(self) -> None:
        """Reset in this loop's mode: inference tensors cannot be updated outside inference mode."""
        for metric in self.evaluation.values():
            cast(Metric, metric).reset()

    def _evaluate(self, stage: str, batch: DistillBatch, dataloader_idx: int) -> None:
        is_own = SOURCES[int(batch.source[0])] == "student"
        for context, wanted in self.pair.teacher.measurements(stage, is_own):
            with context:
                measured = self.measure(batch, tuple(wanted.values()))
                self._update_measures(wanted, measured, batch.teachers_present or ())

    def _update_measures(
        self, wanted: Mapping[str, Quantity], measured: Measured, teachers: Sequence[int]
    ) -> None:
        for name, quantity in wanted.items():
            values = measured[quantity]
            values = -values if isinstance(quantity, DrawnLogProb) else values
            self._update(name, name, values)
            for number in teachers:
                assert measured.teacher is not None
                own = values[measured.teacher == number]
                self._update(f"{name}/{number}", f"{name}/{self.teacher_names[number]}", own)

    def _update(self, key: str, name: str, values: Tensor) -> None:
        """Add values to a measure, and log it; all ranks call this, also without values."""
        metric = cast(Metric, self.evaluation[key])
        metric.update(values)
        self.log(name, metric, on_epoch=True, add_dataloader_idx=False, batch_size=1)

    def predict_step(
        self, batch: DistillBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> list[dict[str, Any]]:
        """Return prompt and generated response of every row, as text."""
        return generation_records(batch, self.decode)

    def on_validation_start(self) -> None:
        """Log measures at the step of the weights, resumed or loaded."""
        if not self.trainer.sanity_checking:
            count_steps(self.trainer, max(0, (self.trainer.global_step or self._loaded_step) - 1))

    on_test_start = on_validation_start
