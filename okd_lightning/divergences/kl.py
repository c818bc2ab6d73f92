"""The two Kullback-Leibler divergences, and Jeffreys' sum of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from okd_lightning.divergences.base import Divergence
from okd_lightning.divergences.log_arithmetic import finite
from okd_lightning.divergences.logprob_pair import LogProbPair, Summands
from okd_lightning.records.shapes import LogProbs, LogRatio, PerId, RatioValues


@dataclass(frozen=True)
class ForwardKL(Divergence):
    """KL(q‖p) = sum_a q (log q - log p), teacher first: f(u) = u ln u. Covers the teacher's modes.

    Infinite if an id has p = 0 and q > 0. With the teacher detached, its gradient is that of
    cross-entropy on soft labels: knowledge distillation (arXiv 1503.02531).
    """

    def generator(self, log_ratio: LogRatio) -> RatioValues:
        """f(u) = u ln u."""
        return log_ratio.exp() * finite(log_ratio)

    def weight(self, log_ratio: LogRatio) -> RatioValues:
        """w_f(u) = u; centred, u - 1."""
        return log_ratio.exp()

    def terms(
        self, student_logprobs: LogProbs, teacher_logprobs: LogProbs, log_ratio: PerId
    ) -> PerId:
        """p·f(u) = q (log q - log p)."""
        return teacher_logprobs.exp() * log_ratio

    def summands(self, pair: LogProbPair) -> Summands:
        """p·f(u) = q λ and p (w_f(u) - w_f(1)) = q - p."""
        return Summands(pair.teacher_probs * pair.log_ratio, pair.difference)

    @property
    def limit_at_zero(self) -> float:
        """f(0) = 0."""
        return 0.0

    @property
    def limit_at_infinity(self) -> float:
        """f(u)/u -> inf as u -> inf."""
        return math.inf


@dataclass(frozen=True)
class ReverseKL(Divergence):
    """KL(p‖q) = sum_a p (log p - log q), student first: f(u) = -ln u. Seeks the teacher's modes.

    Infinite if an id has p > 0 and q = 0. The only f for which -f and w_f differ by a constant, so
    that the plain reward -f is unbiased (arXiv 2606.01039).
    """

    def generator(self, log_ratio: LogRatio) -> RatioValues:
        """f(u) = -ln u."""
        return -log_ratio

    def weight(self, log_ratio: LogRatio) -> RatioValues:
        """w_f(u) = ln u - 1; centred, ln u."""
        return log_ratio - 1.0

    def terms(
        self, student_logprobs: LogProbs, teacher_logprobs: LogProbs, log_ratio: PerId
    ) -> PerId:
        """p·f(u) = p (log p - log q)."""
        return -(student_logprobs.exp() * log_ratio)

    def summands(self, pair: LogProbPair) -> Summands:
        """p·f(u) = -p λ and p (w_f(u) - w_f(1)) = p λ."""
        weighted = pair.student_probs * pair.log_ratio
        return Summands(-weighted, weighted)

    @property
    def limit_at_zero(self) -> float:
        """f(0) = inf."""
        return math.inf

    @property
    def limit_at_infinity(self) -> float:
        """f(u)/u -> 0 as u -> inf."""
        return 0.0


@dataclass(frozen=True)
class Jeffreys(Divergence):
    """KL(q‖p) + KL(p‖q) = sum_a (q - p)(log q - log p): f(u) = (u - 1) ln u. Symmetric."""

    def generator(self, log_ratio: LogRatio) -> RatioValues:
        """f(u) = (u - 1) ln u."""
        return log_ratio.expm1() * log_ratio

    def weight(self, log_ratio: LogRatio) -> RatioValues:
        """w_f(u) = ln u + u - 1; centred, the same."""
        return log_ratio + log_ratio.expm1()

    def terms(
        self, student_logprobs: LogProbs, teacher_logprobs: LogProbs, log_ratio: PerId
    ) -> PerId:
        """p·f(u) = (q - p)(log q - log p)."""
        return (teacher_logprobs.exp() - student_logprobs.exp()) * log_ratio

    def summands(self, pair: LogProbPair) -> Summands:
        """p·f(u) = (q - p) λ and p·w_f(u) = p λ + q - p."""
        weights = torch.addcmul(pair.difference, pair.student_probs, pair.log_ratio)
        return Summands(pair.difference * pair.log_ratio, weights)

    @property
    def limit_at_zero(self) -> float:
        """f(0) = inf."""
        return math.inf

    @property
    def limit_at_infinity(self) -> float:
        """f(u)/u -> inf as u -> inf."""
        return math.inf

    @property
    def is_symmetric(self) -> bool:
        """True."""
        return True
