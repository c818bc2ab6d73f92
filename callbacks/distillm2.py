"""DistiLLM-2: pull up on the teacher's responses, push down on the student's.

Ko et al., "DistiLLM-2: A Contrastive Approach Boosts the Distillation of LLMs", arXiv 2503.07067,
Eq. 5: skew KL on what the teacher wrote, skew reverse KL on what the student wrote, the mean of
both, each divided by its own count. Differs from the paper: every token counts alike, and not every
response; a prompt is answered by one of the two, in halves of every optimizer step; the student
writes anew for each step, or for each chunk of data.prompts_per_rollout, and not once an epoch. The
curricula of β and α (section 3.3) are left out, as in the defaults of the paper's code.
"""

from __future__ import annotations

from okd_lightning import DistillationCallback, DivergenceCallback
from okd_lightning.divergences import SkewForwardKL, SkewReverseKL
from okd_lightning.losses import ExactDivergence, Measured, Quantity
from okd_lightning.records import LossOutput
from okd_lightning.reduction import loss_output


class TeacherHalf(DivergenceCallback):
    """A divergence on the teacher's responses alone."""

    sources = ("teacher",)


class DistiLLM2(DistillationCallback):
    """KL(p‖(1-α)q + αp) on the student's responses and KL(q‖αq + (1-α)p) on the teacher's.

    They are terms of their own with half the weight each: ``train/<name>`` and
    ``train/<name>_teacher``.

    Args:
        alpha: α of both, strictly between 0 and 1.
        weight: Factor on the mean of both losses.
        name: Logged as ``train/<name>``.
    """

    sources = ("student",)
    on_policy_fraction = 1.0

    def __init__(self, alpha: float = 0.1, weight: float = 1.0, name: str | None = None) -> None:
        super().__init__(weight / 2, name)
        self.push = ExactDivergence(SkewReverseKL(alpha))
        half = TeacherHalf(SkewForwardKL(alpha), weight=weight / 2, name=f"{self.name}_teacher")
        self.further_terms = (half,)

    @property
    def quantities(self) -> tuple[Quantity, ...]:
        """The divergence on the student's responses."""
        return (self.push,)

    def loss(self, measured: Measured) -> LossOutput:
        """The sum over the student's rows, in nats."""
        return loss_output(measured[self.push], measured.mask(self.sources))
