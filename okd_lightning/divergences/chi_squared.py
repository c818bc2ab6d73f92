"""Pearson's and Neyman's chi-squared: squared differences over one side or the other.

The sums are squares of differences of exponentials, so that they are infinite only where the term
itself exceeds the floating type, and never negative.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from okd_lightning.divergences.base import Divergence
from okd_lightning.divergences.log_arithmetic import scaled_expm1
from okd_lightning.divergences.logprob_pair import LogProbPair, Summands
from okd_lightning.records.shapes import LogProbs, LogRatio, PerId, RatioValues


@dataclass(frozen=True)
class PearsonChiSquared(Divergence):
    """sum_a (q - p)^2 / p: f(u) = (u - 1)^2. Twice ``AlphaDivergence(2)``; no upper bound."""

    def generator(self, log_ratio: LogRatio) -> RatioValues:
        """f(u) = (u - 1)^2."""
        return log_ratio.expm1().square()

    def weight(self, log_ratio: LogRatio) -> RatioValues:
        """w_f(u) = u^2 - 1; centred, the same."""
        return (2.0 * log_ratio).expm1()

    def terms(
        self, student_logprobs: LogProbs, teacher_logprobs: LogProbs, log_ratio: PerId
    ) -> PerId:
        """p·f(u) = (q/sqrt(p) - sqrt(p))^2."""
        teacher_over_root = ((teacher_logprobs + log_ratio) / 2.0).exp()
        return (teacher_over_root - (student_logprobs / 2.0).exp()).square()

    def summands(self, pair: LogProbPair) -> Summands:
        """p·f(u) as in ``terms`` and p·w_f(u) = p (u^2 - 1)."""
        terms = self.terms(pair.student_logprobs, pair.teacher_logprobs, pair.log_ratio)
        return Summands(terms, scaled_expm1(pair.student_logprobs, 2.0 * pair.log_ratio))

    @property
    def limit_at_zero(self) -> float:
        """f(0) = 1."""
        return 1.0

    @property
    def limit_at_infinity(self) -> float:
        """f(u)/u -> inf as u -> inf."""
        return math.inf


@dataclass(frozen=True)
class NeymanChiSquared(Divergence):
    """sum_a (q - p)^2 / q: f(u) = (u - 1)^2 / u. Twice ``AlphaDivergence(-1)``; no upper bound."""

    def generator(self, log_ratio: LogRatio) -> RatioValues:
        """f(u) = (u - 1)^2 / u."""
        return (2.0 * (log_ratio / 2.0).sinh()).square()

    def weight(self, log_ratio: LogRatio) -> RatioValues:
        """w_f(u) = 2 - 2/u; centred, the same."""
        return -2.0 * (-log_ratio).expm1()

    def terms(
        self, student_logprobs: LogProbs, teacher_logprobs: LogProbs, log_ratio: PerId
    ) -> PerId:
        """p·f(u) = (p/sqrt(q) - sqrt(q))^2."""
        student_over_root = ((student_logprobs - log_ratio) / 2.0).exp()
        return (student_over_root - (teacher_logprobs / 2.0).exp()).square()

    def summands(self, pair: LogProbPair) -> Summands:
        """p·f(u) as in ``terms`` and p·w_f(u) = -2 p (1/u - 1)."""
        terms = self.terms(pair.student_logprobs, pair.teacher_logprobs, pair.log_ratio)
        return Summands(terms, scaled_expm1(pair.student_logprobs, -pair.log_ratio).mul_(-2.0))

    @property
    def limit_at_zero(self) -> float:
        """f(0) = inf."""
        return math.inf

    @property
    def limit_at_infinity(self) -> float:
        """f(u)/u -> 1 as u -> inf."""
        return 1.0
