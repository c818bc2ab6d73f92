"""Two models' next-token distributions on the tokens that both vocabularies have.

At the beginning of a chunk both models have read the same text. Their next-token distributions are
compared over the partition {each token that both have, by its bytes; the end of the response;
everything else}. Where the tokenizations agree this uses both models' whole distributions, not only
the target's probability. It is an approximation: "the next token is X" is not the same event under
two tokenizers, since one of them may have longer tokens that begin with X.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from okd_lightning.losses.projection import Side, slices, tile_size
from okd_lightning.records.chunks import SharedIds

_LEAST = 1e-12
"""Lower bound of a cell's probability: the rounding of a sum of probabilities near 1."""

Compare = Callable[[Tensor, Tensor], Tensor]
"""Two models' [rows, cells] log-probabilities (nats) → [rows] divergences."""


@dataclass(frozen=True)
class NextTokens:
    """One model's next-token distribution at the beginning of each chunk.

    Attributes:
        side: The model.
        positions: [chunks] loss positions of the chunks' first tokens.
        shared: The ids that both vocabularies have.
        temperature: τ of the softmax.
    """

    side: Side
    positions: Tensor
    shared: SharedIds
    temperature: float

    def cells(self, hidden: Tensor) -> Tensor:
        """[rows, hidden] → [rows, cells + 2] log-probabilities (nats); the last are end and rest.

        In float64, with gradient to the model.
        """
        probabilities = (self.side.head(hidden).double() / self.temperature).softmax(-1)
        ends = torch.tensor(self.side.end_ids, device=hidden.device, dtype=torch.int64)
        end = probabilities.index_select(-1, ends).sum(-1, keepdim=True)
        rest = probabilities.index_fill(-1, ends, 0.0)  # an end may have text
        own = rest.index_select(-1, self.shared.ids)
        known = own.new_zeros((len(own), self.shared.num)).index_add(-1, self.shared.cells, own)
        known = torch.cat([known, end], -1)
        found = torch.cat([known, 1.0 - known.sum(-1, keepdim=True)], -1).clamp(min=_LEAST)
        return (found / found.sum(-1, keepdim=True)).log()


def compare_next_tokens(
    one: NextTokens,
    other: NextTokens,
    compare: Compare,
    learns: tuple[bool, bool],
    tile_chunks: int | None = None,
) -> Tensor:
    """[chunks] divergences between two models' distributions, tile by tile.

    Args:
        one: The first argument of ``compare``.
        other: The second one.
        compare: The divergence.
        learns: For both, whether gradient flows to it.
        tile_chunks: Chunks per tile; None chooses from the vocabularies.
    """

    def values(hidden: Tensor, hidden_other: Tensor) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and learns[0]):
            cells = one.cells(hidden)
        with torch.set_grad_enabled(torch.is_grad_enabled() and learns[1]):
            cells_other = other.cells(hidden_other)
        return compare(cells, cells_other)

    num, width = len(one.positions), max(one.side.width, other.side.width)
    size = tile_chunks or tile_size(width, one.positions.device)
    parts = []
    for tile in slices(num, size):
        given = tuple(one.side.hidden[one.positions[tile]] for one in (one, other))
        is_kept = num <= size or not torch.is_grad_enabled()
        parts.append(values(*given) if is_kept else checkpoint(values, *given, use_reentrant=False))
    return torch.cat(parts)
