"""The sequences of a micro-batch that one model reads, with their loss positions and packing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from okd_lightning.records.packing import Packing, pack


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
    """

    input_ids: Tensor
    lengths: Tensor
    mask: Tensor

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
            self.input_ids[index, :width], self.lengths[index], self.mask[index, :width]
        )
        vars(read)["row_lengths"] = lengths
        return read

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Sequences:
        """Return the sequences on another device, with loss positions and row lengths."""

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=non_blocking)

        read = Sequences(moved(self.input_ids), moved(self.lengths), moved(self.mask))
        vars(read)["places"] = LossPlaces(moved(self.places.row), moved(self.places.column))
        vars(read)["row_lengths"] = self.row_lengths
        return read
