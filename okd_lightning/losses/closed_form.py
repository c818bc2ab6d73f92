"""Values with their gradients in the logits written out: few passes over the vocabulary.

What autograd would differentiate op by op (log-softmax, ratio, f, product, sum) is one formula of
METHODS 1.1 here. Softmaxes are handed in, so that all quantities of a tile share them.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from okd_lightning.divergences import Divergence, LogProbPair
from okd_lightning.shapes import LogProbs, PerId, PositionIds, PositionValues

ModelRole: TypeAlias = Literal["student", "teacher"]


class _SoftmaxSum(torch.autograd.Function):
    """sum_a g(a) of softmaxed logits, whose gradient in them is probs * sum(slopes) - slopes."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, terms: Tensor, slopes: Tensor, probs: Tensor, scale: float
    ) -> Tensor:
        ctx.save_for_backward(slopes, probs)
        ctx.scale = scale
        return terms.sum(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        slopes, probs = ctx.saved_tensors
        factor = (gradient * ctx.scale)[:, None]
        total = slopes.sum(-1, keepdim=True) * factor
        return torch.mul(probs, total).addcmul_(slopes, factor, value=-1), None, None, None, None


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
    """The exact divergence at every position; its gradient is a closed form.

    Args:
        divergence: Whose summands are taken.
        pair: Both sides at ``temperature``, finite.
        temperature: The divergence's.
        learner: Whose gradient is wanted; the other side is a constant.
        logits: [positions, vocab] the learner's, at temperature 1; gradient flows to them.

    Returns:
        [positions] nats.
    """
    if not (torch.is_grad_enabled() and logits.requires_grad):
        terms = divergence.terms(pair.student_logprobs, pair.teacher_logprobs, pair.log_ratio)
        return terms.sum(-1)
    parts = divergence.summands(pair)
    if learner == "student":
        slopes, probs, sign = parts.weights, pair.student_probs, 1.0
    else:
        slopes, probs, sign = parts.terms + parts.weights, pair.teacher_probs, -1.0
    value: Tensor = _SoftmaxSum.apply(logits, parts.terms, slopes, probs, sign / temperature)
    return value


def target_logprob(logits: PerId, logprobs: LogProbs, targets: PositionIds) -> PositionValues:
    """[positions] log-probability (nats) of the targets, with gradient to ``logits``.

    Args:
        logits: [positions, vocab].
        logprobs: [positions, vocab] their log-softmax.
        targets: [positions] ids.
    """
    value: Tensor = _TargetLogProb.apply(logits, logprobs.detach(), targets)
    return value
