"""Supervised fine-tuning: cross-entropy on dataset responses."""

from __future__ import annotations

from okd_lightning.callbacks.methods.base import DistillationCallback
from okd_lightning.losses import DrawnLogProb, Measured, Quantity
from okd_lightning.losses.reduction import loss_output
from okd_lightning.records.batches import LossOutput, Source


class SFT(DistillationCallback):
    """Cross-entropy of the student on dataset responses; needs no teacher.

    With ``seq_kd`` it is sequence-level KD (Kim & Rush, arXiv 1606.07947): the teacher generates
    the responses. Gradient flows to the student.

    Args:
        seq_kd: Train on the teacher's generations instead of dataset responses.
        weight: Factor on this term's mean loss.
        name: Logged as ``train/<name>``; two methods of one class need different names.
    """

    on_policy_fraction = 0.0
    quantities: tuple[Quantity, ...] = (DrawnLogProb(),)

    def __init__(self, seq_kd: bool = False, weight: float = 1.0, name: str | None = None) -> None:
        super().__init__(weight, name)
        self.seq_kd = seq_kd

    @property
    def sources(self) -> tuple[Source, ...]:
        """The dataset, or the teacher."""
        return ("teacher",) if self.seq_kd else ("dataset",)

    def loss(self, measured: Measured) -> LossOutput:
        """Return the cross-entropy summed over the rows of ``sources``, in nats."""
        return loss_output(-measured[DrawnLogProb()], measured.mask(self.sources))
