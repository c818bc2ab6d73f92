"""The abstract f-divergence: a convex function f and what training derives from it.

Owns the interface, its default implementations, and the sum over the vocabulary. Does not own any
particular f, token masks, or the divisor of a loss.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch

from okd_lightning.divergences.log_arithmetic import widen
from okd_lightning.divergences.logprob_pair import LogProbPair, Summands
from okd_lightning.records.shapes import (
    DrawnIds,
    IdMask,
    LogProbs,
    LogRatio,
    OutcomeIds,
    PerId,
    PerToken,
    RatioValues,
)

_FAR = 350.0
"""Log-ratio (nats) used as infinity in float64: exp(2 * 350) is still finite."""


class Divergence(ABC):
    """D_f(p, q) = E_{a~p}[f(u)], with u = q(a)/p(a): teacher over student, f convex and f(1) = 0.

    Everything is a function of the log-ratio, ``log_ratio`` = ln u = log q - log p (teacher minus
    student, nats), because u itself overflows. A divergence must define only ``generator``. A
    complete one:

        @dataclass(frozen=True)
        class Triangular(Divergence):
            '''Vincze-Le Cam: sum_a (q - p)^2 / (q + p), f(u) = (u - 1)^2 / (u + 1).'''

            def generator(self, log_ratio: Tensor) -> Tensor:
                return log_ratio.expm1() * (log_ratio / 2).tanh()

    The rest is derived from ``generator`` in float64: ``weight`` by autograd, ``terms`` and both
    limits by evaluation. A divergence may override, for speed, range or memory, ``weight``,
    ``terms``, ``summands``, ``limit_at_zero``, ``limit_at_infinity`` and ``is_symmetric``, each in
    agreement with ``generator``. Only a wrapper that changes the distributions themselves overrides
    ``value``, ``drawn`` and ``expected_weight``; it overrides ``softmax_temperature`` and
    ``outcome_ids`` too if they describe the change completely.

    Gradient flows to both sides; the caller detaches the side that is to stay fixed.

    Attributes:
        merges_ids: True where ``outcome_ids`` may merge ids; set for a class that overrides it.
    """

    merges_ids: bool = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "outcome_ids" in vars(cls):
            cls.merges_ids = True

    @abstractmethod
    def generator(self, log_ratio: LogRatio) -> RatioValues:
        """Return f(u), element by element.

        Args:
            log_ratio: log q - log p (nats), any shape; only finite ones need to be handled.

        Returns:
            Same shape, nats; differentiable in ``log_ratio``.
        """

    def weight(self, log_ratio: LogRatio) -> RatioValues:
        """w_f(u) = -f(u) + u f'(u): the advantage whose policy gradient minimises D_f.

        The gradient of D_f(p, q) with respect to the student is -E_{a~p}[w_f(u) grad log p(a)]. The
        term u f'(u) is the dependence of f(u) on the student; it equals the derivative of f with
        respect to the log-ratio. If f is rewritten as f + c(u - 1), w_f changes by a constant
        only; -f does not.

        Args:
            log_ratio: log q - log p (nats) of the sampled tokens, any shape.

        Returns:
            Same shape, nats. Detach it before use as a coefficient. This default has no graph, and
            loses precision to cancellation from about 30 nats on.

        Source: arXiv 2606.01039 (OPD+).
        """
        with torch.inference_mode(False), torch.enable_grad():
            # the clone is no inference tensor, which autograd would refuse
            wide = log_ratio.detach().double().clone().requires_grad_()
            values = self.generator(wide)
            (slopes,) = torch.autograd.grad(values.sum(), wide)
            return (slopes - values.detach()).to(log_ratio.dtype)

    def terms(
        self, student_logprobs: LogProbs, teacher_logprobs: LogProbs, log_ratio: PerId
    ) -> PerId:
        """Return the summand p f(u) of every id, before the sum over the vocabulary.

        This default evaluates f in float64 up to 350 nats and continues it linearly in the
        log-ratio beyond, which is exact for all f that grow no faster than a KL.

        Where either side is -inf, ``log_ratio`` is passed as 0 and the result is discarded, but it
        and its gradient must be finite.

        Args:
            student_logprobs: [*lead, vocab] log p, float32 or float64.
            teacher_logprobs: [*lead, vocab] log q, of the same type.
            log_ratio: [*lead, vocab] log q - log p.

        Returns:
            [*lead, vocab] nats, with gradient to all three arguments.
        """
        near = log_ratio.double().clamp(-_FAR, _FAR)
        beyond = log_ratio.double() - near
        slope_below, slope_above = self._end_slopes()
        values = self._scaled_generator(near)
        values = values + slope_below * beyond.clamp(max=0) + slope_above * beyond.clamp(min=0)
        base = torch.where(log_ratio > 0, teacher_logprobs, student_logprobs).double()
        return (base.exp() * values).to(log_ratio.dtype)

    def summands(self, pair: LogProbPair) -> Summands:
        """Return the summands p f(u) and p (w_f(u) - w_f(1)) of every id.

        With c_f = w_f - w_f(1) the divergence is sum_a p f, and its gradients in the logits are

            d/dz_s = p E_p[c_f] - p c_f            (student)
            d/dz_t = q g(u) - q E_q[g(u)]          (teacher), g(u) = f'(u) - f'(1),

        where q g(u) = p f + p c_f - w_f(1) (q - p), because f'(1) = w_f(1). Both are 0 where
        student and teacher agree. Without centring, two numbers of size p would cancel there and
        leave the rounding error of log_softmax: 3 % of the gradient in float32 over 152,000 ids at
        differences of 1e-3 (benchmarks/near_equality.py).

        This default differentiates ``terms``: p w_f is minus its slope in log p. p w_f(1) is the
        same with the teacher's log-probabilities replaced by the student's, rounded the same way.

        Args:
            pair: Both sides, with finite log-ratios, at this divergence's ``softmax_temperature``.

        Returns:
            Constants without graph; callers must not modify them in place.
        """
        with torch.inference_mode(False), torch.enable_grad():
            log_p = pair.student_logprobs.clone().requires_grad_()
            found = []
            for log_q in (pair.teacher_logprobs.clone(), pair.student_logprobs.clone()):
                terms = self.terms(log_p, log_q, log_q - log_p)
                found += [terms.detach(), *torch.autograd.grad(terms.sum(), log_p)]
        terms, slopes, _, slopes_at_one = found
        return Summands(terms, slopes_at_one - slopes)

    @property
    def weight_at_one(self) -> float:
        """w_f(1) = f'(1): ``weight`` where student and teacher agree."""
        return float(self.weight(torch.zeros(1, dtype=torch.float64)))

    def outcome_ids(
        self, student_logprobs: LogProbs, teacher_logprobs: LogProbs
    ) -> OutcomeIds | None:
        """Return [*lead, k] the ids compared one by one, if all others are merged into one outcome.

        None (the default): every id is a separate outcome.

        Args:
            student_logprobs: [*lead, vocab] log p (nats) at this divergence's temperature.
            teacher_logprobs: [*lead, vocab] log q (nats), likewise.
        """
        del student_logprobs, teacher_logprobs
        return None

    @property
    def softmax_temperature(self) -> float | None:
        """Softmax temperature that ``value`` applies to both sides; None if it is unknown."""
        return 1.0 if type(self).value is Divergence.value else None

    @property
    def limit_at_zero(self) -> float:
        """f(0), nats: cost, per unit of p, of an id with q = 0. May be inf."""
        return self._limit(-_FAR)

    @property
    def limit_at_infinity(self) -> float:
        """Limit of f(u)/u, nats: cost, per unit of q, of an id with p = 0. May be inf."""
        return self._limit(_FAR)

    @property
    def is_symmetric(self) -> bool:
        """True if D(p, q) = D(q, p) for all p and q."""
        return False

    @property
    def upper_bound(self) -> float | None:
        """Largest value, reached by distributions without common support; None if unbounded."""
        bound = self.limit_at_zero + self.limit_at_infinity
        return bound if math.isfinite(bound) else None

    def centred_weight(self, log_ratio: LogRatio) -> RatioValues:
        """w_f(u) - w_f(1): zero where student and teacher agree, the same for f and f + c(u - 1).

        If the tokens are sampled from p itself, its expected gradient is that of ``weight``.

        Args:
            log_ratio: log q - log p (nats) of the sampled tokens, any shape.
        """
        return self.weight(log_ratio) - self.weight(torch.zeros_like(log_ratio))

    def value(self, student_logprobs: LogProbs, teacher_logprobs: LogProbs) -> PerToken:
        """Return the exact divergence at every position: sum_a p f(u) over the vocabulary.

        Computed from log-probabilities, in float32 or the wider input type. An id that is -inf on
        both sides contributes zero to value and gradient. One that is -inf on one side contributes
        the limit of f, so that an infinite divergence is +inf and never NaN. A NaN input gives NaN.

        Args:
            student_logprobs: [*lead, vocab] log p (nats), normalised over the last axis.
            teacher_logprobs: [*lead, vocab] log q (nats), likewise.

        Returns:
            [*lead] nats per position, not summed and not masked. Gradient flows to both sides.
        """
        student_logprobs, teacher_logprobs = widen(student_logprobs, teacher_logprobs)
        no_student, no_teacher = student_logprobs == -math.inf, teacher_logprobs == -math.inf
        excluded = no_student | no_teacher
        log_ratio = (teacher_logprobs - student_logprobs).masked_fill(excluded, 0.0)
        terms = self.terms(student_logprobs, teacher_logprobs, log_ratio).masked_fill(excluded, 0.0)
        terms = _at_limit(terms, student_logprobs, no_teacher & ~no_student, self.limit_at_zero)
        terms = _at_limit(terms, teacher_logprobs, no_student & ~no_teacher, self.limit_at_infinity)
        return terms.sum(dim=-1)

    def drawn(
        self, student_logprobs: LogProbs, teacher_logprobs: LogProbs, ids: DrawnIds
    ) -> tuple[PerToken, PerToken]:
        """Return both sides' log-probabilities of the sampled tokens.

        Args:
            student_logprobs: [*lead, vocab] log p (nats).
            teacher_logprobs: [*lead, vocab] log q (nats).
            ids: [*lead] tokens sampled from p.

        Returns:
            [*lead] log p and log q (nats) of the sampled tokens; a wrapper that merges tokens into
            one outcome returns that outcome's. Gradient flows to both sides.
        """
        at = ids[..., None]
        return student_logprobs.gather(-1, at)[..., 0], teacher_logprobs.gather(-1, at)[..., 0]

    @torch.no_grad()
    def expected_weight(
        self,
        student_logprobs: LogProbs,
        teacher_logprobs: LogProbs,
        max_log_ratio: float = math.inf,
    ) -> PerToken:
        """Return E_{a~p}[w_f(u)], the mean of ``weight`` at a position: a value baseline.

        Subtracting it from the weights of tokens sampled from p leaves their expected gradient
        unchanged (vOPD, arXiv 2605.07865).

        Args:
            student_logprobs: [*lead, vocab] log p (nats).
            teacher_logprobs: [*lead, vocab] log q (nats).
            max_log_ratio: The log-ratio is clipped to ± this many nats before w_f.

        Returns:
            [*lead] nats, without gradient; evaluated in float64, up to log-ratios of 350 nats.
        """
        log_ratio = (teacher_logprobs - student_logprobs).double()
        log_ratio.masked_fill_(student_logprobs == -math.inf, 0.0)
        limit = min(max_log_ratio, _FAR)
        weights = self.centred_weight(log_ratio.clamp_(-limit, limit))
        mean = (student_logprobs.double().exp() * weights).sum(-1)
        return (mean + self.weight_at_one).to(student_logprobs.dtype)

    def _scaled_generator(self, log_ratio: LogRatio) -> RatioValues:
        """f(u)/max(1, u): p f(u) over the larger of p and q, in range at both ends."""
        excess = torch.where(log_ratio > 0, log_ratio, torch.zeros_like(log_ratio))
        return self.generator(log_ratio) * (-excess).exp()

    @torch.no_grad()
    def _limit(self, end: float) -> float:
        """Limit of f(u)/max(1, u) at an end; inf if its steps do not shrink (ln u, u)."""
        ends = torch.tensor([end / 4, end / 2, end], dtype=torch.float64)
        near, far, farthest = self._scaled_generator(ends).tolist()
        last_step, step_before = abs(farthest - far), abs(far - near)
        has_settled = last_step < 1e-12 or last_step < step_before / 2
        return farthest if has_settled else math.inf

    @torch.no_grad()
    def _end_slopes(self) -> tuple[float, float]:
        """Slopes of f(u)/max(1, u) in the log-ratio at both ends; 0 where they overflow."""
        ends = torch.tensor([-_FAR, 1 - _FAR, _FAR - 1, _FAR], dtype=torch.float64)
        slopes = self._scaled_generator(ends).diff()[[0, 2]].nan_to_num(0.0, 0.0, 0.0).tolist()
        return slopes[0], slopes[1]


def _at_limit(terms: PerId, logprobs: LogProbs, where: IdMask, limit: float) -> PerId:
    """``terms``, with exp(logprobs) * limit where ``where`` is True."""
    if math.isfinite(limit) and limit != 0.0:
        return torch.where(where, logprobs.exp() * limit, terms)
    return terms.masked_fill(where, limit)  # no product: inf * 0 would reach the gradient as NaN
