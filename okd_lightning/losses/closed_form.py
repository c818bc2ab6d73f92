"""Values with closed-form gradients in the logits, which need few passes over the vocabulary.

The formulas of METHODS 1.1 replace autograd through log-softmax, ratio, f, product and sum.
Softmaxes are arguments, so that all quantities of a tile share them.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from okd_lightning.divergences import Divergence, LogProbPair
from okd_lightning.divergences.top_k import merged
from okd_lightning.records.shapes import LogProbs, OutcomeIds, PerId, PositionIds, PositionValues

ModelRole: TypeAlias = Literal["student", "teacher"]


class _SoftmaxSum(torch.autograd.Function):
    """sum_a g(a) of softmaxed logits, whose gradient in them is probs * total - slopes.

    The total is the sum of the slopes. Where all slopes are 0, the gradient is exactly 0.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        terms: Tensor,
        slopes: Tensor,
        total: Tensor,
        probs: Tensor,
        scale: float,
    ) -> Tensor:
        ctx.save_for_backward(slopes, total, probs)
        ctx.scale = scale
        return terms.sum(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        slopes, total, probs = ctx.saved_tensors
        factor = (gradient * ctx.scale)[:, None]
        found = torch.mul(probs, total * factor).addcmul_(slopes, factor, value=-1)
        return found, None, None, None, None, None


class _TargetLogProb(torch.autograd.Function):
    """log p(target), whose gradient in the logits is onehot - p."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, logprobs: Tensor, targets: Tensor) -> Tensor:
        ctx.save_for_backward(logprobs, targets)
        return logprobs.gather(-1, targets[:, None]).squeeze(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        logprobs, targets = ctx.saved_tensors
        found = logprobs.exp().mul_(-gradient[:, None])
        return found.scatter_add_(-1, targets[:, None], gradient[:, None]), None, None


def divergence_value(
    divergence: Divergence,
    pair: LogProbPair,
    temperature: float,
    learner: ModelRole,
    logits: PerId,
) -> PositionValues:
    """Return the exact divergence at every position, with a closed-form gradient.

    Args:
        divergence: The divergence.
        pair: Both sides at ``temperature``, finite.
        temperature: The divergence's softmax temperature.
        learner: The side that gets gradient; the other side is a constant.
        logits: [positions, vocab] the learner's, at temperature 1; gradient flows to them.

    Returns:
        [positions] nats. The gradient is exactly 0 where both sides agree.
    """
    ids = None
    if divergence.merges_ids:
        ids = divergence.outcome_ids(pair.student_logprobs, pair.teacher_logprobs)
    if ids is not None:
        sides = (pair.student_logprobs, pair.teacher_logprobs)
        known = LogProbPair(*(merged(side, ids) for side in sides))
        of_learner = sides[0] if learner == "student" else sides[1]
        return outcome_value(divergence, known, ids, of_learner, temperature, learner, logits)
    if not (torch.is_grad_enabled() and logits.requires_grad):
        terms = divergence.terms(pair.student_logprobs, pair.teacher_logprobs, pair.log_ratio)
        return terms.sum(-1)
    terms, slopes = _terms_and_slopes(divergence, pair, learner)
    probs = pair.student_probs if learner == "student" else pair.teacher_probs
    total = slopes.sum(-1, keepdim=True)
    value: Tensor = _SoftmaxSum.apply(logits, terms, slopes, total, probs, 1.0 / temperature)
    return value


def outcome_value(
    divergence: Divergence,
    pair: LogProbPair,
    ids: OutcomeIds,
    logprobs: LogProbs,
    temperature: float,
    learner: ModelRole,
    logits: PerId,
) -> PositionValues:
    """Return the divergence over k ids and one outcome for all others, with closed-form gradient.

    The slope of the last outcome is distributed over its ids in proportion to their probability.

    Args:
        divergence: The divergence.
        pair: Both sides' outcomes, [positions, k + 1], finite.
        ids: [positions, k] ids that are single outcomes.
        logprobs: [positions, vocab] the learner's at ``temperature``, without gradient.
        temperature: The divergence's softmax temperature.
        learner: The side that gets gradient; the other side is a constant.
        logits: [positions, vocab] the learner's, at temperature 1; gradient flows to them.

    Returns:
        [positions] nats.
    """
    if not (torch.is_grad_enabled() and logits.requires_grad):
        terms = divergence.terms(pair.student_logprobs, pair.teacher_logprobs, pair.log_ratio)
        return terms.sum(-1)
    terms, slopes = _terms_and_slopes(divergence, pair, learner)
    known = pair.student_logprobs if learner == "student" else pair.teacher_logprobs
    spread = (logprobs - known[:, -1:]).exp_().mul_(slopes[:, -1:])
    spread.scatter_(-1, ids, slopes[:, :-1])
    total = slopes.sum(-1, keepdim=True)
    value: Tensor = _SoftmaxSum.apply(
        logits, terms, spread, total, logprobs.exp(), 1.0 / temperature
    )
    return value


def _terms_and_slopes(
    divergence: Divergence, pair: LogProbPair, learner: ModelRole
) -> tuple[PerId, PerId]:
    """Return the summands p f(u), and minus their centred slopes in the learner's log-probs."""
    parts = divergence.summands(pair)
    if learner == "student":
        return parts.terms, parts.weights
    slopes = (parts.terms + parts.weights).neg_()  # -q (f'(u) - f'(1)); see Divergence.summands
    at_one = divergence.weight_at_one
    return parts.terms, slopes.add_(pair.difference, alpha=at_one) if at_one else slopes


def target_logprob(logits: PerId, logprobs: LogProbs, targets: PositionIds) -> PositionValues:
    """[positions] log-probability (nats) of the targets, with gradient to ``logits``.

    Args:
        logits: [positions, vocab].
        logprobs: [positions, vocab] their log-softmax.
        targets: [positions] ids.
    """
    value: Tensor = _TargetLogProb.apply(logits, logprobs.detach(), targets)
    return value
