"""Packing: several rows of a micro-batch laid end to end, so that no model computes padding.

Owns the plan alone, from the rows' lengths. That rows do not see each other is the business of the
model's own attention, which is told where each begins by its position ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapreplace

import torch
from torch import Tensor

_WIDEST = 2
"""Length of a packed row at most, in rows of the longest length (that the even filling exceeds)."""

_ATTENTION = 0.1
"""What attention within the longest row costs, in what all else on its tokens costs."""


_PLANS = 16
"""Numbers of packed rows that are tried, besides the largest."""


@dataclass(frozen=True)
class Packing:
    """Which token stands where, when rows are packed.

    Rows are spread evenly over packed rows of up to twice the longest one, so that attention,
    whose cost grows with the length of a packed row, costs about what it did.

    Attributes:
        row: [packed_batch, packed_seq] the row of the batch that a place belongs to; 0 at the end
            of a packed row that is not full.
        column: [packed_batch, packed_seq] the token of that row; 0 where there is none.
        position_ids: [packed_batch, packed_seq] the same numbers, but counted on where there is
            no token, so that what stands there is more rows, none above the longest, that nobody
            reads.
        start: [batch] where each row begins, counted over the packed rows laid end to end.
    """

    row: Tensor
    column: Tensor
    position_ids: Tensor
    start: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Packing:
        """The same plan on another device."""
        moved = {name: t.to(device, non_blocking=non_blocking) for name, t in vars(self).items()}
        return Packing(**moved)


def pack(lengths: Sequence[int]) -> Packing:
    """Plan the packing of rows of some lengths.

    Args:
        lengths: Tokens of each row, at least one.
    """
    total, longest = sum(lengths), max(lengths)
    fewest = -(-total // (_WIDEST * longest))
    most = min(total // longest + 1, len(lengths))
    step = -(-(most - fewest) // _PLANS) or 1
    plans = [_spread(lengths, num) for num in (*range(fewest, most, step), most)]

    def cost(plan: list[list[int]]) -> float:
        width = _width(plan, lengths)
        return len(plan) * width * (1 + _ATTENTION * width / longest)

    bins = min(plans, key=cost)
    shape = len(bins), _width(bins, lengths)
    row, column = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    position_ids, start = torch.zeros_like(row), torch.zeros(len(lengths), dtype=torch.int64)
    for number, members in enumerate(bins):
        begin = 0
        for member in members:
            end = begin + lengths[member]
            start[member] = number * shape[1] + begin
            row[number, begin:end] = member
            column[number, begin:end] = torch.arange(lengths[member])
            begin = end
        position_ids[number] = column[number]
        position_ids[number, begin:] = torch.arange(shape[1] - begin) % longest
    return Packing(row, column, position_ids, start)


def _spread(lengths: Sequence[int], num: int) -> list[list[int]]:
    """Rows in ``num`` groups of like total length: the longest first, each to the least full."""
    groups: list[list[int]] = [[] for _ in range(num)]
    totals = [(0, group) for group in range(num)]
    for member in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        total, group = totals[0]
        groups[group].append(member)
        heapreplace(totals, (total + lengths[member], group))
    return groups


def _width(groups: Sequence[Sequence[int]], lengths: Sequence[int]) -> int:
    return max(sum(lengths[member] for member in group) for group in groups)
