"""Alpha-divergences: one family that contains both KLs, Hellinger and both chi-squareds."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from okd_lightning.divergences.base import Divergence
from okd_lightning.divergences.log_arithmetic import finite, scaled_expm1
from okd_lightning.divergences.logprob_pair import LogProbPair, Summands
from okd_lightning.errors import ConfigError
from okd_lightning.records.shapes import LogProbs, LogRatio, PerId, RatioValues


@dataclass(frozen=True)
class AlphaDivergence(Divergence):
    """f(u) = (u^alpha - 1 - alpha (u - 1)) / (alpha (alpha - 1)), w_f(u) = (u^alpha - 1) / alpha.

    alpha = 0 is reverse KL and alpha = 1 is forward KL (both exact, and stable nearby). 1/2 is
    twice squared Hellinger, 2 half of Pearson's chi-squared, -1 half of Neyman's. Exchanging
    student and teacher exchanges alpha and 1 - alpha.

    f is written so that w_f(1) = 0 for every alpha: at alpha = 0 it is u - 1 - ln u, which gives
    the divergence of ``ReverseKL`` and its centred weight, and at alpha = 1 it is u ln u - u + 1.

    Args:
        alpha: Any finite number. Larger ones cover the teacher's modes, smaller ones seek them.

    Raises:
        ConfigError: ``alpha`` is not finite.

    Source: Cichocki and Amari, Entropy 12 (2010) 1532, Eq. 23; w_f from arXiv 2606.01039.
    """

    alpha: float

    def __post_init__(self) -> None:
        if not math.isfinite(self.alpha):
            raise ConfigError(
                f"AlphaDivergence: alpha is {self.alpha!r}, expected a finite number "
                "(0 is reverse KL, 1 is forward KL)"
            )

    def generator(self, log_ratio: LogRatio) -> RatioValues:
        """f(u) = (u^alpha - 1 - alpha (u - 1)) / (alpha (alpha - 1))."""
        if self.alpha > 0.0:  # f(0) is finite
            log_ratio = finite(log_ratio)
        excess = torch.where(log_ratio > 0, log_ratio, torch.zeros_like(log_ratio))
        return excess.exp() * self.terms(-excess, log_ratio - excess, log_ratio)

    def weight(self, log_ratio: LogRatio) -> RatioValues:
        """w_f(u) = (u^alpha - 1) / alpha, or ln u at alpha = 0."""
        return _power_log(torch.zeros_like(log_ratio), log_ratio, self.alpha)

    def terms(
        self, student_logprobs: LogProbs, teacher_logprobs: LogProbs, log_ratio: PerId
    ) -> PerId:
        """p·f(u) = (p^(1-alpha) q^alpha - p - alpha (q - p)) / (alpha (alpha - 1))."""
        if self.alpha <= 0.5:  # each half keeps away from the pole of the other
            return _lower_terms(student_logprobs, log_ratio, self.alpha)
        return _lower_terms(teacher_logprobs, -log_ratio, 1.0 - self.alpha)

    def summands(self, pair: LogProbPair) -> Summands:
        """p·f(u) as in ``terms`` and p·w_f(u) = p (u^alpha - 1) / alpha."""
        terms = self.terms(pair.student_logprobs, pair.teacher_logprobs, pair.log_ratio)
        return Summands(terms, _power_log(pair.student_logprobs, pair.log_ratio, self.alpha))

    @property
    def limit_at_zero(self) -> float:
        """f(0) = 1/alpha for alpha > 0, else inf."""
        return 1.0 / self.alpha if self.alpha > 0 else math.inf

    @property
    def limit_at_infinity(self) -> float:
        """f(u)/u -> 1/(1 - alpha) for alpha < 1, else inf."""
        return 1.0 / (1.0 - self.alpha) if self.alpha < 1 else math.inf

    @property
    def is_symmetric(self) -> bool:
        """True at alpha = 1/2."""
        return self.alpha == 0.5


def _lower_terms(base_logprobs: LogProbs, log_ratio: PerId, alpha: float) -> PerId:
    """exp(base_logprobs) * ((u - 1) - (u^alpha - 1)/alpha) / (1 - alpha)."""
    linear = scaled_expm1(base_logprobs, log_ratio)
    return (linear - _power_log(base_logprobs, log_ratio, alpha)) / (1.0 - alpha)


def _power_log(log_scale: LogRatio, log_ratio: LogRatio, alpha: float) -> RatioValues:
    """exp(log_scale) (u^alpha - 1)/alpha, which is exp(log_scale) ln u at alpha = 0."""
    if alpha == 0.0:
        return log_scale.exp() * log_ratio
    return scaled_expm1(log_scale, alpha * log_ratio) / alpha
