"""Skew KL: a KL whose second argument is mixed with its first, and so is bounded."""

from __future__ import annotations

import math
from dataclasses import dataclass

from okd_lightning.divergences.base import Divergence
from okd_lightning.divergences.log_arithmetic import finite, mixture_log_ratios
from okd_lightning.divergences.logprob_pair import LogProbPair, Summands
from okd_lightning.errors import ConfigError
from okd_lightning.shapes import LogProbs, LogRatio, PerId, RatioValues


@dataclass(frozen=True)
class SkewForwardKL(Divergence):
    """KL(q‖alpha q + (1 - alpha) p): f(u) = u ln(u / (alpha u + 1 - alpha)).

    Forward KL with a bounded gradient; it tends to forward KL as alpha -> 0 and to 0 as alpha -> 1.

    Args:
        alpha: Share of the teacher in the mixture, strictly between 0 and 1.

    Raises:
        ConfigError: ``alpha`` is outside (0, 1).

    Source: arXiv 2402.03898 (DistiLLM), section 3.1.
    """

    alpha: float = 0.1

    def __post_init__(self) -> None:
        _check_alpha("SkewForwardKL", self.alpha, "ForwardKL")

    def generator(self, log_ratio: LogRatio) -> RatioValues:
        """f(u) = u ln(u / (alpha u + 1 - alpha))."""
        over_teacher = mixture_log_ratios(finite(log_ratio), self.alpha, 1.0 - self.alpha)[1]
        return -log_ratio.exp() * over_teacher

    def weight(self, log_ratio: LogRatio) -> RatioValues:
        """w_f(u) = (1 - alpha) u / (alpha u + 1 - alpha); centred, minus (1 - alpha)."""
        over_teacher = mixture_log_ratios(log_ratio, self.alpha, 1.0 - self.alpha)[1]
        return (1.0 - self.alpha) * (-over_teacher).exp()

    def terms(
        self, student_logprobs: LogProbs, teacher_logprobs: LogProbs, log_ratio: PerId
    ) -> PerId:
        """p·f(u) = q (log q - log m), m = alpha q + (1 - alpha) p."""
        over_teacher = mixture_log_ratios(log_ratio, self.alpha, 1.0 - self.alpha)[1]
        return -(teacher_logprobs.exp() * over_teacher)

    def summands(self, pair: LogProbPair) -> Summands:
        """p·f(u) = q (log q - log m) and p (w_f(u) - w_f(1)) = (1 - alpha)^2 p (q - p)/m."""
        share, rest = self.alpha, 1.0 - self.alpha
        mixture = pair.mixture(share, rest)
        weights = (pair.student_probs / mixture).mul_(pair.difference)
        over_teacher = pair.log_over_larger(mixture).sub_(pair.log_ratio.clamp(max=0.0))
        return Summands(over_teacher.mul_(pair.teacher_probs).neg_(), weights.mul_(rest**2))

    @property
    def limit_at_zero(self) -> float:
        """f(0) = 0."""
        return 0.0

    @property
    def limit_at_infinity(self) -> float:
        """f(u)/u -> -ln(alpha) as u -> inf."""
        return -math.log(self.alpha)


@dataclass(frozen=True)
class SkewReverseKL(Divergence):
    """KL(p‖(1 - alpha) q + alpha p): f(u) = -ln(alpha + (1 - alpha) u).

    Reverse KL with a bounded gradient; it tends to reverse KL as alpha -> 0 and to 0 as alpha -> 1.

    Args:
        alpha: Share of the student in the mixture, strictly between 0 and 1.

    Raises:
        ConfigError: ``alpha`` is outside (0, 1).

    Source: arXiv 2402.03898 (DistiLLM), section 3.1.
    """

    alpha: float = 0.1

    def __post_init__(self) -> None:
        _check_alpha("SkewReverseKL", self.alpha, "ReverseKL")

    def generator(self, log_ratio: LogRatio) -> RatioValues:
        """f(u) = -ln(alpha + (1 - alpha) u)."""
        return -mixture_log_ratios(log_ratio, 1.0 - self.alpha, self.alpha)[0]

    def weight(self, log_ratio: LogRatio) -> RatioValues:
        """w_f(u) = ln m - (1 - alpha) u / m, m = alpha + (1 - alpha) u; centred, + (1 - alpha)."""
        over_student, over_teacher = mixture_log_ratios(log_ratio, 1.0 - self.alpha, self.alpha)
        return over_student - (1.0 - self.alpha) * (-over_teacher).exp()

    def terms(
        self, student_logprobs: LogProbs, teacher_logprobs: LogProbs, log_ratio: PerId
    ) -> PerId:
        """p·f(u) = p (log p - log m), m = (1 - alpha) q + alpha p."""
        over_student = mixture_log_ratios(log_ratio, 1.0 - self.alpha, self.alpha)[0]
        return -(student_logprobs.exp() * over_student)

    def summands(self, pair: LogProbPair) -> Summands:
        """p·f(u) = p (log p - log m) and p (w_f(u) - w_f(1)) = -p·f(u) - r p (q - p)/m.

        r = alpha (1 - alpha), because q/m - 1 = alpha (q - p)/m.
        """
        share, rest = 1.0 - self.alpha, self.alpha
        mixture = pair.mixture(share, rest)
        drift = (pair.student_probs / mixture).mul_(pair.difference)
        over_student = pair.log_over_larger(mixture).add_(pair.log_ratio.clamp(min=0.0))
        weighted = over_student.mul_(pair.student_probs)
        return Summands(-weighted, drift.mul_(-share * rest).add_(weighted))

    @property
    def limit_at_zero(self) -> float:
        """f(0) = -ln(alpha)."""
        return -math.log(self.alpha)

    @property
    def limit_at_infinity(self) -> float:
        """f(u)/u -> 0 as u -> inf."""
        return 0.0


def _check_alpha(name: str, alpha: float, limit: str) -> None:
    """Raise ConfigError unless 0 < alpha < 1."""
    if not 0.0 < alpha < 1.0:
        raise ConfigError(
            f"{name}: alpha is {alpha!r}, expected a number strictly between 0 and 1 "
            f"(the limit alpha -> 0 is {limit})"
        )
