"""Distribution of a model over texts: the probability that a text begins with some bytes.

M(x) is the mass of all texts that begin with the bytes x. The tokens of a text that begins with x
contain a *cover* of x: the tokenizer's own tokens of x up to a boundary m before its end, then a
token that reaches or passes the end (arXiv 2412.03719, 2512.14954). With P(m) the probability of
the own tokens up to m,

    M(x) = Σ_m P(m) · Σ {p(t | m): the bytes of t begin with x[m:]},

and the inner sum is a range of the cumulative softmax, with the vocabulary sorted by bytes. P(x)
alone omits the longer tokens: a teacher that always encodes `ab` as one token gives the token `a`
before `b` no probability. Everything here is relative to P(x): reach(x) = M(x) / P(x), at least 1.
Gradient flows to the side's model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from okd_lightning.losses.projection import Side, tile_size
from okd_lightning.records.chunks import Covers

_LEAST = 1e-12
"""Lower bound of an outcome's probability: the rounding of a sum of probabilities near 1."""


def cover_masses(
    side: Side, covers: Covers, order: Tensor, temperature: float, tile_positions: int | None
) -> Tensor:
    """[covers, ranges] probability of the tokens in each range, in float64.

    Args:
        side: The model's hidden states at its loss positions, and its head.
        covers: Ranges of tokens, by position. With ranges by next byte there is one more column:
            the end of the response, as one outcome.
        order: Ids with text, sorted by bytes.
        temperature: τ of the softmax.
        tile_positions: Positions per tile; None chooses from the vocabulary.
    """
    has_ends = covers.bounds.shape[1] > 2
    positions, number = covers.position.unique(return_inverse=True)
    if not len(positions):
        columns = covers.bounds.shape[1] - 1 + has_ends
        return side.hidden.new_zeros((0, columns), dtype=torch.float64)
    size = tile_positions or tile_size(side.width, side.hidden.device)
    ends = torch.tensor(side.end_ids, device=order.device, dtype=order.dtype)

    def masses(hidden: Tensor, bounds: Tensor, row: Tensor) -> Tensor:
        probabilities = (side.head(hidden).double() / temperature).softmax(-1)
        total = probabilities.index_select(-1, order).cumsum(-1)
        total = torch.cat([total.new_zeros(len(total), 1), total], -1)
        found = total[row[:, None], bounds].diff(dim=-1)
        if has_ends:
            end = probabilities.index_select(-1, ends).sum(-1)
            found = torch.cat([found, end[row][:, None]], -1)
        return found

    parts, places = [], []
    for start in range(0, len(positions), size):
        own = ((number >= start) & (number < start + size)).nonzero().squeeze(-1)
        hidden = side.hidden[positions[start : start + size]]
        given = hidden, covers.bounds[own], number[own] - start
        is_kept = len(positions) <= size or not torch.is_grad_enabled()
        parts.append(masses(*given) if is_kept else checkpoint(masses, *given, use_reentrant=False))
        places.append(own)
    return torch.cat(parts)[torch.cat(places).argsort()]


@dataclass(frozen=True)
class TextLaw:
    """One model's distribution over the texts of a micro-batch, at its sync points.

    Attributes:
        covers: The covers.
        masses: From ``cover_masses``.
        logprobs: [positions] log-probability (nats) of the side's tokens.
    """

    covers: Covers
    masses: Tensor
    logprobs: Tensor

    @cached_property
    def _factors(self) -> Tensor:
        """[covers] P(m) / P(x): one over the probability of the own tokens from m to the point."""
        wide = self.logprobs.double()
        total = torch.cat([wide.new_zeros(1), wide.cumsum(0)])
        to = self.covers.place[self.covers.point]
        return (total[self.covers.position] - total[to]).exp()

    @cached_property
    def _is_past(self) -> Tensor:
        """[covers] True where the cover begins before its point."""
        return self.covers.position < self.covers.place[self.covers.point]

    @cached_property
    def reach(self) -> Tensor:
        """[points] M(x) / P(x), at least 1; 1 at a point without covers before it."""
        ranges = self.masses if self.covers.bounds.shape[1] == 2 else self.masses[:, :257]
        mass = (self._factors * ranges.sum(-1)).where(self._is_past, 0.0)
        found = mass.new_zeros(len(self.covers.place)).index_add(0, self.covers.point, mass)
        return found.clamp(min=1.0)

    def next_bytes(self, points: Tensor, alphabet: Tensor) -> Tensor:
        """[points, bytes + 2] log-probability (nats) of the byte after each of some sync points.

        The last two outcomes are the end of the response, and everything else: other bytes, control
        ids, and texts that the side's tokenizer would segment differently.

        Args:
            points: The points.
            alphabet: [bytes] the bytes that are outcomes of their own.
        """
        bytes_and_end = self._factors[:, None] * self.masses[:, 1:]
        bytes_and_end = torch.cat(
            [
                bytes_and_end[:, :256].index_select(-1, alphabet),
                bytes_and_end[:, 256:].where(~self._is_past[:, None], 0.0),
            ],
            -1,
        )
        shape = len(self.covers.place), bytes_and_end.shape[1]
        total = bytes_and_end.new_zeros(shape).index_add(0, self.covers.point, bytes_and_end)
        known = (total / self.reach[:, None])[points]
        rest = 1.0 - known.sum(-1, keepdim=True)
        cells = torch.cat([known, rest], -1).clamp(min=_LEAST)
        return (cells / cells.sum(-1, keepdim=True)).log()

    def chunk_logprobs(self, start: Tensor, end: Tensor, path: Tensor) -> Tensor:
        """[chunks] log M(end) - log M(start), at most 0.

        Args:
            start: [chunks] the sync point before each chunk.
            end: [chunks] the one after it.
            path: [chunks] log-probability of the chunk's own tokens.
        """
        reach = self.reach.log()
        found = path.double() + reach[end] - reach[start]
        return found.clamp(max=math.log1p(-_LEAST))
