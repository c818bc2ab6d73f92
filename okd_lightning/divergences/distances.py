"""Total variation (a metric) and squared Hellinger (the square of a metric)."""

from __future__ import annotations

from dataclasses import dataclass

from okd_lightning.divergences.base import Divergence
from okd_lightning.divergences.logprob_pair import LogProbPair, Summands
from okd_lightning.records.shapes import LogProbs, LogRatio, PerId, RatioValues


@dataclass(frozen=True)
class SquaredHellinger(Divergence):
    """sum_a (sqrt(q) - sqrt(p))^2: f(u) = (sqrt(u) - 1)^2. Symmetric, at most 2."""

    def generator(self, log_ratio: LogRatio) -> RatioValues:
        """f(u) = (sqrt(u) - 1)^2."""
        return (log_ratio / 2.0).expm1().square()

    def weight(self, log_ratio: LogRatio) -> RatioValues:
        """w_f(u) = sqrt(u) - 1; centred, the same."""
        return (log_ratio / 2.0).expm1()

    def terms(
        self, student_logprobs: LogProbs, teacher_logprobs: LogProbs, log_ratio: PerId
    ) -> PerId:
        """p·f(u) = (sqrt(q) - sqrt(p))^2."""
        return ((teacher_logprobs / 2.0).exp() - (student_logprobs / 2.0).exp()).square()

    def summands(self, pair: LogProbPair) -> Summands:
        """p·f(u) = (sqrt(q) - sqrt(p))^2 and p·w_f(u) = sqrt(p) (sqrt(q) - sqrt(p))."""
        root = pair.student_probs.sqrt()
        difference = pair.teacher_probs.sqrt().sub_(root)
        return Summands(difference.square(), root.mul_(difference))

    @property
    def limit_at_zero(self) -> float:
        """f(0) = 1."""
        return 1.0

    @property
    def limit_at_infinity(self) -> float:
        """f(u)/u -> 1 as u -> inf."""
        return 1.0

    @property
    def is_symmetric(self) -> bool:
        """True."""
        return True


@dataclass(frozen=True)
class TotalVariation(Divergence):
    """sum_a |q - p| / 2: f(u) = |u - 1| / 2. Symmetric, at most 1.

    The gradient is that of sign(q - p), and 0 where both sides agree.
    """

    def generator(self, log_ratio: LogRatio) -> RatioValues:
        """f(u) = |u - 1| / 2."""
        return log_ratio.expm1().abs() / 2.0

    def weight(self, log_ratio: LogRatio) -> RatioValues:
        """w_f(u) = sign(u - 1) / 2; centred, the same."""
        return log_ratio.sign() / 2.0

    def terms(
        self, student_logprobs: LogProbs, teacher_logprobs: LogProbs, log_ratio: PerId
    ) -> PerId:
        """p·f(u) = |q - p| / 2; the sign is taken from the log-ratio, which rounds less."""
        return (teacher_logprobs.exp() - student_logprobs.exp()) * log_ratio.sign() / 2.0

    def summands(self, pair: LogProbPair) -> Summands:
        """p·f(u) = |q - p| / 2 and p·w_f(u) = p sign(λ) / 2."""
        half_sign = pair.log_ratio.sign().mul_(0.5)
        terms = pair.difference * half_sign
        return Summands(terms, half_sign.mul_(pair.student_probs))

    @property
    def limit_at_zero(self) -> float:
        """f(0) = 1/2."""
        return 0.5

    @property
    def limit_at_infinity(self) -> float:
        """f(u)/u -> 1/2 as u -> inf."""
        return 0.5

    @property
    def is_symmetric(self) -> bool:
        """True."""
        return True
