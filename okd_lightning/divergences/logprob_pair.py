"""Both sides' log-probabilities and what every divergence computes from them, once for all of them.

Everything here is a constant of the loss: nothing carries a graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from okd_lightning.shapes import LogProbs, LogRatio, PerId


class LogProbPair:
    """Student and teacher at some positions, at one temperature.

    Args:
        student_logprobs: [*lead, vocab] log p (nats), normalised, float32 or wider, detached.
        teacher_logprobs: [*lead, vocab] log q, likewise.
    """

    def __init__(self, student_logprobs: LogProbs, teacher_logprobs: LogProbs) -> None:
        self.student_logprobs = student_logprobs
        self.teacher_logprobs = teacher_logprobs

    @cached_property
    def student_probs(self) -> Tensor:
        """[*lead, vocab] p."""
        return self.student_logprobs.exp()

    @cached_property
    def teacher_probs(self) -> Tensor:
        """[*lead, vocab] q."""
        return self.teacher_logprobs.exp()

    @cached_property
    def log_ratio(self) -> LogRatio:
        """[*lead, vocab] log q - log p."""
        return self.teacher_logprobs - self.student_logprobs

    @cached_property
    def is_finite(self) -> bool:
        """Whether no id is ruled out on either side, so that closed forms need no case for it.

        Every -inf, inf and NaN reaches the sum of the log-ratios.
        """
        return bool(self.log_ratio.sum().isfinite())

    def mixture(self, share: float, rest: float) -> Tensor:
        """[*lead, vocab] m = share q + rest p, kept above zero so that p ln m is 0 at p = 0."""
        mixed = self.teacher_probs * share
        mixed.add_(self.student_probs, alpha=rest)
        return mixed.clamp_(min=torch.finfo(mixed.dtype).tiny)


@dataclass(frozen=True)
class Summands:
    """What a divergence and both its gradients are sums of; see ``Divergence.summands``.

    Attributes:
        terms: [*lead, vocab] p f(u).
        weights: [*lead, vocab] p w_f(u).
    """

    terms: PerId
    weights: PerId
