"""DistiLLM-2: skew KL on the teacher's responses, skew reverse KL on the student's.

Ko et al., "DistiLLM-2: A Contrastive Approach Boosts the Distillation of LLMs", arXiv 2503.07067,
Eq. 5: the mean of skew KL on the teacher's responses and skew reverse KL on the student's, each
divided by its own count.

Differs from the paper:

- Every token has the same weight, instead of every response.
- A prompt is answered by one of the two models, in halves of every optimizer step.
- The student generates for each step, or for each rollout batch of ``data.prompts_per_rollout``,
  instead of once an epoch.
- The curricula of β and α (section 3.3) are left out; ``beta`` is a constant.

Differs from the released code (jongwooko/distillm-2, commit fe4cf9b, ``src/distillm_trainer.py``):

- It stops the gradient through the student inside the mixture of the skew reverse KL (lines 1196
  and 1208): the value is the same, but the gradient is Σ_a ∇p_a (log p_a - log m_a) with m a
  constant. The formula, KL(p‖(1-α)q + αp), has the student in both places and no stop; its
  gradient is the default here, ``stop_mixture: true`` gives the code's.
- It adds the two halves with the weights 2 - β and β, β = 1 unless its option ``gradual_beta`` is
  set, which is twice the mean: ``weight: 2.0`` gives that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from okd_lightning import DistillationCallback, DivergenceCallback
from okd_lightning.divergences import SkewForwardKL, SkewReverseKL
from okd_lightning.errors import ConfigError
from okd_lightning.losses import ExactDivergence, Measured, Quantity, Tile
from okd_lightning.losses.reduction import loss_output
from okd_lightning.records.batches import LossOutput


class TeacherHalf(DivergenceCallback):
    """A divergence on the teacher's responses only."""

    sources = ("teacher",)


@dataclass(frozen=True)
class StoppedSkewReverseKL(Quantity):
    """Σ p (log p - log m), m = (1-α)q + αp a constant, with gradient to the p outside m."""

    alpha: float
    needs_teacher = True

    def measure(self, tile: Tile) -> Tensor:
        """[positions] nats."""
        student, teacher = tile.student_logprobs, tile.teacher_logprobs.detach()
        shares = math.log1p(-self.alpha) + teacher, math.log(self.alpha) + student.detach()
        is_out = student == float("-inf")
        log_ratio = student.masked_fill(is_out, 0.0) - torch.logaddexp(*shares).masked_fill(
            is_out, 0.0
        )
        return (student.exp() * log_ratio).sum(-1)


class DistiLLM2(DistillationCallback):
    """KL(p‖(1-α)q + αp) on the student's responses and KL(q‖αq + (1-α)p) on the teacher's.

    These are two terms with the weights β/2 and (2-β)/2: ``train/<name>`` and
    ``train/<name>_teacher``.

    Args:
        alpha: α of both, strictly between 0 and 1.
        weight: Factor on the mean of both losses.
        name: Logged as ``train/<name>``.
        beta: β, above 0 and below 2: the weight of the student's half over the mean.
        stop_mixture: Stop the gradient through the student inside the mixture of its half.
    """

    sources = ("student",)
    on_policy_fraction = 1.0

    def __init__(
        self,
        alpha: float = 0.1,
        weight: float = 1.0,
        name: str | None = None,
        beta: float = 1.0,
        stop_mixture: bool = False,
    ) -> None:
        if not 0 < beta < 2:
            raise ConfigError(f"DistiLLM-2: beta must be above 0 and below 2, got {beta}")
        super().__init__(weight * beta / 2, name)
        exact = ExactDivergence(SkewReverseKL(alpha))
        self.push: Quantity = StoppedSkewReverseKL(alpha) if stop_mixture else exact
        pull, half = SkewForwardKL(alpha), weight * (2 - beta) / 2
        self.further_terms = (TeacherHalf(pull, weight=half, name=f"{self.name}_teacher"),)

    @property
    def quantities(self) -> tuple[Quantity, ...]:
        """The divergence on the student's responses."""
        return (self.push,)

    def loss(self, measured: Measured) -> LossOutput:
        """Return the sum over the student's rows, in nats."""
        return loss_output(measured[self.push], measured.mask(self.sources))
