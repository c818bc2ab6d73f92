"""ExAccErr: the part of a student's error that comes from its own prefixes (exposure bias).

Arora et al., arXiv 2204.01171, as used by OKD (arXiv 2409.12512, Eq. 5-7). Owns the arithmetic on
per-step divergences; the caller samples the prefixes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


def excess_accumulated_error(student_prefix_kl: Tensor, teacher_prefix_kl: Tensor) -> Tensor:
    """Compute ExAccErr(l) = (R(l) - l·ε(l)) / (l·ε(l)) · 100, in percent.

    R(l) is the sum over steps of KL(q‖p) after prefixes that the *student* sampled (Eq. 6) and ε(l)
    the mean over steps of KL(q‖p) after prefixes that the *teacher* sampled (Eq. 7). 0 means that
    the student's error is no larger after its own prefixes than after the teacher's.

    Args:
        student_prefix_kl: [steps] nats, mean over responses at each step.
        teacher_prefix_kl: [steps] nats, the same steps.

    Returns:
        Scalar; NaN where student and teacher are equal.
    """
    regret = student_prefix_kl.sum()
    expected = teacher_prefix_kl.sum()  # l·ε(l)
    return (regret - expected) / expected * 100


class ExcessAccumulatedError(Metric):
    """ExAccErr over sampled responses.

    A step's divergence is the mean over the responses that reach it; l is the number of steps that
    at least half of either model's responses reach, so that no step depends on a few long ones.

    Args:
        max_steps: Tokens of the longest response.
    """

    full_state_update = False
    higher_is_better = False
    is_differentiable = False
    sums: Tensor
    counts: Tensor

    def __init__(self, max_steps: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        zeros = torch.zeros(2, max_steps, dtype=torch.float64)
        self.add_state("sums", zeros, dist_reduce_fx="sum")
        self.add_state("counts", zeros.clone(), dist_reduce_fx="sum")

    def update(self, kl: Tensor, step: Tensor, is_student_prefix: bool) -> None:
        """Add KL(q‖p) at some positions.

        Args:
            kl: [positions] nats.
            step: [positions] number of response tokens before the position.
            is_student_prefix: Whether the student sampled the responses, or the teacher.
        """
        author = 0 if is_student_prefix else 1
        self.sums[author].index_add_(0, step, kl.detach().double())
        self.counts[author].index_add_(0, step, torch.ones_like(step, dtype=torch.float64))

    def compute(self) -> Tensor:
        """Return percent; NaN without responses of both models."""
        is_reached = (2 * self.counts >= self.counts[:, :1]) & (self.counts > 0)
        means = (self.sums / self.counts)[:, is_reached.all(0)]
        return excess_accumulated_error(means[0], means[1])
