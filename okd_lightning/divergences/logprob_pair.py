"""Log-probabilities of both sides, with cached quantities that divergences share.

All values are constants without an autograd graph.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import leaky_relu

from okd_lightning.divergences.log_arithmetic import THIN_SHARE
from okd_lightning.records.shapes import LogProbs, LogRatio, PerId

_NO_PROBABILITY = -1e4
"""Nats; its exponential is 0 in every floating type."""


class LogProbPair:
    """Log-probabilities of student and teacher at some positions, at one temperature.

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
    def difference(self) -> Tensor:
        """[*lead, vocab] q - p, exactly 0 where both log-probabilities are equal."""
        return self.teacher_probs - self.student_probs

    @cached_property
    def is_finite(self) -> bool:
        """True if all log-ratios are finite, so that closed forms need no special case.

        Every -inf, inf and NaN reaches the sum of the log-ratios.
        """
        return bool(self.log_ratio.sum().isfinite())

    def without_common_gaps(self) -> LogProbPair:
        """Return the pair with ids that are -inf on both sides made finite: they contribute 0."""
        gaps = (self.student_logprobs == -math.inf) & (self.teacher_logprobs == -math.inf)
        sides = (self.student_logprobs, self.teacher_logprobs)
        return LogProbPair(*(side.masked_fill(gaps, _NO_PROBABILITY) for side in sides))

    def mixture(self, share: float, rest: float) -> Tensor:
        """[*lead, vocab] m = share q + rest p, kept above zero so that p ln m is 0 at p = 0.

        Exactly p where both sides agree: it starts from one of them and adds a part of q - p. The
        smaller share is the factor, because 1 - share would round a small one.
        """
        near, far, part = self.student_probs, self.teacher_probs, share
        if rest < share:
            near, far, part = far, near, rest
        mixed = torch.lerp(near, far, part)
        return mixed.clamp_(min=torch.finfo(mixed.dtype).tiny)

    def over_larger(self, share: float, rest: float) -> Tensor:
        """[*lead, vocab] ln m - ln max(p, q), m = share q + rest p, share + rest = 1; at most 0.

        Exactly 0 where both sides agree; ln m - log p is not, because the logarithm of a sum of
        exponentials rounds. log m - log p is this plus max(λ, 0), and log m - log q is this minus
        min(λ, 0).
        """
        larger = self._larger()
        # min(share x, -rest x) / larger of x = q - p, in one buffer: memory bounds these passes
        fall = self.teacher_probs - self.student_probs
        if min(share, rest) >= THIN_SHARE:
            leaky_relu(fall, -share / rest, inplace=True)
            return fall.div_(larger).mul_(-rest).log1p_()
        fall = torch.minimum(fall * share, fall * -rest).div_(larger)
        far = self.mixture(share, rest).div_(larger).log_()  # 1 + fall loses a thin share
        return torch.where(fall > -0.5, fall.log1p(), far)

    def log_over_larger(self, mixture: Tensor) -> Tensor:
        """Return ``over_larger`` of a mixture that is given, and is overwritten.

        Its absolute error is that of a number close to 1; ``over_larger`` keeps the relative one.
        """
        return mixture.div_(self._larger()).log_()

    def _larger(self) -> Tensor:
        """[*lead, vocab] max(p, q), above zero."""
        larger = torch.maximum(self.student_probs, self.teacher_probs)
        return larger.clamp_(min=torch.finfo(larger.dtype).tiny)


@dataclass(frozen=True)
class Summands:
    """Summands of a divergence and of both its gradients; see ``Divergence.summands``.

    Attributes:
        terms: [*lead, vocab] p f(u).
        weights: [*lead, vocab] p (w_f(u) - w_f(1)); 0 where both sides agree.
    """

    terms: PerId
    weights: PerId
