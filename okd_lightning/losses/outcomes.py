"""Distributions as k ids and one outcome for all others, with closed-form gradient.

Owns the format of a side of which only this is known: its "logits" are packed rows of ids and
log-probabilities. The other side is reduced to the same ids.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from okd_lightning.records.shapes import (
    LogProbs,
    OutcomeLogProbs,
    PerId,
    PositionHidden,
    PositionValues,
)


class PackedHead:
    """The head of a side whose hidden states are packed rows; returns these rows."""

    def __init__(self) -> None:
        self.module = nn.Identity()

    def finish(self, raw: Tensor) -> Tensor:
        """Return the rows unchanged."""
        return raw

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return the rows unchanged."""
        return hidden


def pack_outcomes(
    ids: Tensor, logprobs: OutcomeLogProbs, drawn: PositionValues | None = None
) -> PositionHidden:
    """Return [positions, 2k + 1]: k ids (exact in float32 below 2^24), their log-probs, the rest's.

    Args:
        ids: [positions, k] most likely first.
        logprobs: [positions, k + 1] log q (nats) of the ids and of all others together.
        drawn: [positions] log q of the target token if known: one more column.
    """
    columns = [ids.to(logprobs.dtype), logprobs]
    return torch.cat(columns if drawn is None else [*columns, drawn[:, None]], dim=-1)


def unpack_outcomes(packed: Tensor) -> tuple[Tensor, OutcomeLogProbs]:
    """Return the ids and log-probabilities of ``pack_outcomes``."""
    k = (packed.shape[-1] - 1) // 2
    return packed[:, :k].long(), packed[:, k : 2 * k + 1]


def unpack_drawn(packed: Tensor) -> PositionValues:
    """Return [positions] log q of the target tokens; the rows must have been packed with it."""
    assert packed.shape[-1] % 2 == 0, "rows without the log-prob of the target token"
    return packed[:, -1]


def first_outcomes(ids: Tensor, logprobs: OutcomeLogProbs, k: int) -> tuple[Tensor, Tensor]:
    """Reduce a distribution to its k most likely ids; the others are merged into the rest.

    Args:
        ids: [positions, known] most likely first.
        logprobs: [positions, known + 1] log q (nats) of the ids and of all others together.
        k: Ids to keep; all known ids if there are no more.

    Returns:
        [positions, k] ids and [positions, k + 1] log-probabilities, with the inputs' gradient.
    """
    if k >= ids.shape[-1]:
        return ids, logprobs
    rest = logprobs[:, k:].logsumexp(-1, keepdim=True)
    return ids[:, :k], torch.cat([logprobs[:, :k], rest], dim=-1)


class _Outcomes(torch.autograd.Function):
    """log p of k ids and of the rest, with closed-form gradient in the logits.

    With g the gradient in the outcomes, G its sum and r = log p of the rest, the gradient is
    g_a - p_a G for a chosen id and (p_a / exp r) g_rest - p_a G for every other id.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, logprobs: Tensor, ids: Tensor) -> Tensor:
        others = logprobs.scatter(-1, ids, -math.inf)
        is_empty = (others == -math.inf).all(-1, keepdim=True)
        rest = others.masked_fill(is_empty, 0.0).logsumexp(-1, keepdim=True)
        rest = rest.masked_fill(is_empty, -math.inf)
        ctx.save_for_backward(logprobs, others, ids, rest)
        return torch.cat([logprobs.gather(-1, ids), rest], dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        logprobs, others, ids, rest = ctx.saved_tensors
        found = logprobs.exp().mul_(-gradient.sum(-1, keepdim=True))
        of_rest = (others - rest.masked_fill(rest == -math.inf, 0.0)).exp_()
        found.addcmul_(of_rest, gradient[:, -1:])
        return found.scatter_add_(-1, ids, gradient[:, :-1]), None, None


def outcomes(logits: PerId, logprobs: LogProbs, ids: Tensor) -> OutcomeLogProbs:
    """[positions, k + 1] log-probability (nats) of k ids and of all others together.

    Args:
        logits: [positions, vocab]; gradient flows to them.
        logprobs: [positions, vocab] their log-softmax.
        ids: [positions, k] without repeats in a row.

    Returns:
        The last column is -inf where there are no others.
    """
    found: OutcomeLogProbs = _Outcomes.apply(logits, logprobs.detach(), ids)
    return found
