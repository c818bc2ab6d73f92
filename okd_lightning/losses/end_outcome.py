"""Several end ids as one outcome of a distribution, with closed-form gradient.

Models of one family may end a response with different ids (Qwen3-Base with ``<|endoftext|>``, Qwen3
with ``<|im_end|>``). Compared id by id, a divergence takes these for two different actions: reverse
KL and OPD then remove the student's end, and its responses grow to their limit (arXiv 2609.20511).
Here the probability of the outcome "the response ends" is the sum over its ids, for both models.

The merge follows the head's scale, soft-cap and mask, and precedes a temperature: tempering first
gives another distribution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from okd_lightning.records.shapes import PerId, PositionIds, PositionMask, PositionValues


class _MergedEnds(torch.autograd.Function):
    """Logits with the logsumexp of some ids on the first of them and -inf on the others.

    With g the gradient at the first id, the gradient of each of these ids is g times its share of
    their probability. The shares of one position sum to 1.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor) -> Tensor:
        chosen = logits.index_select(-1, ids)
        total = chosen.logsumexp(-1, keepdim=True)
        # -inf - -inf is NaN: ends without probability have no shares
        shares = (chosen - total.masked_fill(total == -math.inf, 0.0)).exp_()
        ctx.save_for_backward(shares, ids)
        merged = logits.index_fill(-1, ids[1:], -math.inf)
        return merged.index_copy_(-1, ids[:1], total)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        shares, ids = ctx.saved_tensors
        # overwrites the columns of the other ids, whose gradient at -inf may be NaN
        found = gradient.clone()
        return found.index_copy_(-1, ids, gradient.index_select(-1, ids[:1]) * shares), None


class EndOutcome:
    """Ids that are one outcome of a tile's distributions; none is merged if there is only one.

    Args:
        end_ids: The ids; the outcome has the first one's place.
        device: Device of the tile.
    """

    def __init__(self, end_ids: Sequence[int], device: torch.device) -> None:
        self.ids = torch.tensor(list(end_ids), device=device)
        self.is_merged = len(end_ids) > 1

    def merge(self, logits: PerId) -> PerId:
        """[positions, vocab] logits of the outcomes, with gradient to ``logits``."""
        if not self.is_merged:
            return logits
        merged: PerId = _MergedEnds.apply(logits, self.ids)
        return merged

    def has(self, ids: PositionIds) -> PositionMask:
        """[positions] True where an id is one of the outcome's."""
        return (ids[:, None] == self.ids).any(-1)

    def outcomes(self, ids: PositionIds) -> PositionIds:
        """[positions] each id's outcome: the first end id for all end ids, else the id."""
        return torch.where(self.has(ids), self.ids[:1], ids) if self.is_merged else ids

    def log_share(self, logits: PerId, ids: PositionIds) -> PositionValues:
        """[positions] log-probability (nats) of an id given its outcome; 0 for other than end ids.

        Args:
            logits: [positions, vocab] before the merge; gradient flows to them.
            ids: [positions].
        """
        among = logits.index_select(-1, self.ids).log_softmax(-1)
        place = (ids[:, None] == self.ids).int().argmax(-1, keepdim=True)
        return torch.where(self.has(ids), among.gather(-1, place)[:, 0], 0.0)
