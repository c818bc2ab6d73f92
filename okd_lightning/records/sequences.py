"""The sequences of a micro-batch that one model reads, with their loss positions and packing.

Packing concatenates rows, so that no padding is computed. It is a plan, from the rows' lengths
alone. The model's attention keeps the rows apart: it finds where each begins from the position ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from heapq import heapreplace

import torch
from torch import Tensor

from okd_lightning.records.images import ImageInputs

_WIDEST = 2
"""Intended longest packed row, in lengths of the longest row (even filling may exceed it)."""

_ATTENTION = 0.1
"""Cost of attention within the longest row, relative to all other computation on its tokens."""


_PLANS = 16
"""Different numbers of packed rows that are tried, besides the largest."""


@dataclass(frozen=True)
class Packing:
    """Positions of the tokens in packed rows.

    Rows are spread evenly over packed rows of up to about twice the longest one, so that the cost
    of attention, which grows with the length of a packed row, stays about the same.

    Attributes:
        row: [packed_batch, packed_seq] the batch row of each packed position; 0 where a packed row
            is not filled.
        column: [packed_batch, packed_seq] the token of that row; 0 where there is none.
        position_ids: [packed_batch, packed_seq] as ``column``; unfilled positions count from 0
            again, as further rows no longer than the longest, whose outputs are not read.
        start: [batch] first position of each row in the flattened packed rows.
    """

    row: Tensor
    column: Tensor
    position_ids: Tensor
    start: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Packing:
        """Return the plan on another device."""
        moved = {name: t.to(device, non_blocking=non_blocking) for name, t in vars(self).items()}
        return Packing(**moved)


def pack(lengths: Sequence[int]) -> Packing:
    """Plan the packing of rows.

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
    """Divide rows into ``num`` groups of similar total length (longest first, least full first)."""
    groups: list[list[int]] = [[] for _ in range(num)]
    totals = [(0, group) for group in range(num)]
    for member in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        total, group = totals[0]
        groups[group].append(member)
        heapreplace(totals, (total + lengths[member], group))
    return groups


def _width(groups: Sequence[Sequence[int]], lengths: Sequence[int]) -> int:
    return max(sum(lengths[member] for member in group) for group in groups)


@dataclass(frozen=True)
class LossPlaces:
    """Positions of the tokens that carry loss, row by row.

    Attributes:
        row: [positions] row of the batch.
        column: [positions] position of the token in its row, at least 1: nothing predicts token 0.
    """

    row: Tensor
    column: Tensor


@dataclass(frozen=True)
class Sequences:
    """Right-padded rows that one model reads, and their loss mask.

    Loss positions and row lengths are computed on the host before the batch moves to its device,
    so that a step does not wait for the device (a synchronisation). The packing is computed on
    first use.

    Attributes:
        input_ids: [batch, seq] ids.
        lengths: [batch] real tokens of each row.
        mask: [batch, seq] True on the tokens that carry loss.
        images: The model's inputs for the rows' images; None without any.
    """

    input_ids: Tensor
    lengths: Tensor
    mask: Tensor
    images: ImageInputs | None = None

    @cached_property
    def places(self) -> LossPlaces:
        """Positions of the tokens that carry loss."""
        row, column = self.mask[:, 1:].nonzero(as_tuple=True)
        return LossPlaces(row, column + 1)

    @cached_property
    def row_lengths(self) -> list[int]:
        """``lengths``, on the host."""
        lengths: list[int] = self.lengths.tolist()
        return lengths

    @cached_property
    def packing(self) -> Packing:
        """Packing of the rows, for a model that supports it."""
        return pack(self.row_lengths).to(self.input_ids.device, non_blocking=True)

    @property
    def num_tokens(self) -> int:
        """Real tokens of all rows."""
        return sum(self.row_lengths)

    def num_positions(self, is_packed: bool) -> int:
        """Return the positions of a forward pass over all rows, with or without a token."""
        return (self.packing.row if is_packed else self.input_ids).numel()

    @property
    def targets(self) -> Tensor:
        """[positions] ids of the tokens that carry loss, row by row."""
        return self.input_ids[self.places.row, self.places.column]

    @property
    def attention_mask(self) -> Tensor:
        """[batch, seq] True on real tokens."""
        positions = torch.arange(self.input_ids.shape[1], device=self.lengths.device)
        return positions < self.lengths[:, None]

    def of_rows(self, rows: Sequence[int]) -> Sequences:
        """Return some of the rows, padded to the longest of them.

        Args:
            rows: At least one, ascending.
        """
        lengths = [self.row_lengths[row] for row in rows]
        index = torch.tensor(rows, device=self.input_ids.device)
        width = max(lengths)
        read = Sequences(
            self.input_ids[index, :width],
            self.lengths[index],
            self.mask[index, :width],
            None if self.images is None else self.images.of_rows(rows),
        )
        vars(read)["row_lengths"] = lengths
        return read

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Sequences:
        """Return the sequences on another device, with loss positions and row lengths."""

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=non_blocking)

        images = None if self.images is None else self.images.to(device, non_blocking)
        read = Sequences(moved(self.input_ids), moved(self.lengths), moved(self.mask), images)
        vars(read)["places"] = LossPlaces(moved(self.places.row), moved(self.places.column))
        vars(read)["row_lengths"] = self.row_lengths
        return read
