"""The generalised Jensen-Shannon divergence JSD(beta) of GKD, from forward to reverse KL."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from okd_lightning.divergences.base import Divergence
from okd_lightning.divergences.kl import ForwardKL, ReverseKL
from okd_lightning.divergences.log_arithmetic import finite, mixture_log_ratios
from okd_lightning.divergences.logprob_pair import LogProbPair, Summands
from okd_lightning.errors import ConfigError
from okd_lightning.shapes import LogProbs, LogRatio, PerId, RatioValues


@dataclass(frozen=True)
class _MixtureDivergence(Divergence):
    """scale * (beta KL(q‖m) + (1 - beta) KL(p‖m)), m = beta q + (1 - beta) p, 0 < beta < 1."""

    beta: float
    scale: float

    def generator(self, log_ratio: LogRatio) -> RatioValues:
        over_student, over_teacher = self._mixture_log_ratios(finite(log_ratio))
        of_teacher = self.beta * log_ratio.exp() * over_teacher
        return -self.scale * (of_teacher + (1.0 - self.beta) * over_student)

    def weight(self, log_ratio: LogRatio) -> RatioValues:
        return self.scale * (1.0 - self.beta) * self._mixture_log_ratios(log_ratio)[0]

    def terms(
        self, student_logprobs: LogProbs, teacher_logprobs: LogProbs, log_ratio: PerId
    ) -> PerId:
        over_student, over_teacher = self._mixture_log_ratios(log_ratio)
        of_teacher = teacher_logprobs.exp() * over_teacher
        of_student = student_logprobs.exp() * over_student
        from_teacher, from_student = -self.scale * self.beta, -self.scale * (1.0 - self.beta)
        return from_teacher * of_teacher + from_student * of_student

    def summands(self, pair: LogProbPair) -> Summands:
        over_larger = pair.over_larger(self.beta, 1.0 - self.beta)
        over_student = pair.log_ratio.clamp(min=0.0).add_(over_larger)
        over_teacher = torch.sub(over_student, pair.log_ratio, out=over_larger)
        weights = over_student.mul_(pair.student_probs).mul_(self.scale * (1.0 - self.beta))
        terms = over_teacher.mul_(pair.teacher_probs).mul_(-self.scale * self.beta).sub_(weights)
        return Summands(terms, weights)

    @property
    def limit_at_zero(self) -> float:
        return -self.scale * (1.0 - self.beta) * math.log1p(-self.beta)

    @property
    def limit_at_infinity(self) -> float:
        return -self.scale * self.beta * math.log(self.beta)

    def _mixture_log_ratios(self, log_ratio: LogRatio) -> tuple[RatioValues, RatioValues]:
        """The log-ratios log m - log p and log m - log q."""
        return mixture_log_ratios(log_ratio, self.beta, 1.0 - self.beta)


@dataclass(frozen=True)
class JensenShannon(Divergence):
    """JSD(beta) = beta KL(q‖m) + (1 - beta) KL(p‖m), with the mixture m = beta q + (1 - beta) p.

    f(u) = beta u ln u - (beta u + 1 - beta) ln(beta u + 1 - beta), and
    w_f(u) = (1 - beta) ln(beta u + 1 - beta). Bounded, symmetric at beta = 1/2 only.

    beta = 0 is defined as forward KL and beta = 1 as reverse KL, as public implementations of GKD
    have it. **The scale is therefore not continuous**: the formula itself tends to 0 at both ends,
    like beta * KL(q‖p) and (1 - beta) * KL(p‖q), so that a run at beta = 0.01 has about a hundredth
    of the gradient of one at beta = 0. ``normalised`` divides by beta (1 - beta): its limits are
    the two KLs, so that a sweep over beta compares like with like.

    Args:
        beta: Share of the teacher in the mixture, in [0, 1].
        normalised: Divide by beta (1 - beta); changes nothing at beta = 0 and beta = 1.

    Raises:
        ConfigError: ``beta`` is outside [0, 1].

    Source: arXiv 2306.13649 (GKD), Eq. 1.
    """

    beta: float = 0.5
    normalised: bool = False

    def __post_init__(self) -> None:
        if not 0.0 <= self.beta <= 1.0:
            raise ConfigError(
                f"JensenShannon: beta is {self.beta!r}, expected a number in [0, 1] "
                "(0 is forward KL, 1 is reverse KL)"
            )

    def generator(self, log_ratio: LogRatio) -> RatioValues:
        """f(u) = beta u ln u - (beta u + 1 - beta) ln(beta u + 1 - beta)."""
        return self._form.generator(log_ratio)

    def weight(self, log_ratio: LogRatio) -> RatioValues:
        """w_f(u) = (1 - beta) ln(beta u + 1 - beta); centred, the same."""
        return self._form.weight(log_ratio)

    def terms(
        self, student_logprobs: LogProbs, teacher_logprobs: LogProbs, log_ratio: PerId
    ) -> PerId:
        """p·f(u) = beta q (log q - log m) + (1 - beta) p (log p - log m)."""
        return self._form.terms(student_logprobs, teacher_logprobs, log_ratio)

    def summands(self, pair: LogProbPair) -> Summands:
        """p·f(u) as in ``terms``, and p·w_f(u) = (1 - beta) p (log m - log p)."""
        return self._form.summands(pair)

    @property
    def limit_at_zero(self) -> float:
        """f(0) = -(1 - beta) ln(1 - beta)."""
        return self._form.limit_at_zero

    @property
    def limit_at_infinity(self) -> float:
        """f(u)/u -> -beta ln(beta) as u -> inf."""
        return self._form.limit_at_infinity

    @property
    def is_symmetric(self) -> bool:
        """True at beta = 1/2."""
        return self.beta == 0.5

    @property
    def _form(self) -> Divergence:
        """The divergence that this beta stands for."""
        if self.beta == 0.0:
            return ForwardKL()
        if self.beta == 1.0:
            return ReverseKL()
        scale = 1.0 / (self.beta * (1.0 - self.beta)) if self.normalised else 1.0
        return _MixtureDivergence(self.beta, scale)
