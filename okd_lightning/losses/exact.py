"""The exact loss layer: heads over tiles of positions, in bounded memory.

Hidden states go in and one number a position comes out. Logits exist for one tile at a time: where
a batch needs several tiles, each is recomputed in the backward pass (activation checkpointing), so
that memory does not grow with tokens × vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from okd_lightning.losses.quantities import Quantity, Tile
from okd_lightning.shapes import PositionHidden, PositionIds, PositionValues

_TILE_ELEMENTS = 2**24
"""Logits a tile holds at most: 64 MB in float32, a handful of which are alive at once."""


@dataclass(frozen=True)
class Side:
    """One model's half of the loss layer.

    Attributes:
        hidden: [positions, hidden] what its head reads at the masked-in positions.
        head: From hidden states to [positions, vocab] logits.
    """

    hidden: PositionHidden
    head: Callable[[Tensor], Tensor]


def measure(
    quantities: Iterable[Quantity],
    student: Side,
    teacher: Side | None,
    targets: PositionIds,
    vocab_size: int,
    tile_positions: int | None = None,
    base: Side | None = None,
) -> dict[Quantity, PositionValues]:
    """Measure every quantity at every position.

    Args:
        quantities: What to measure; duplicates are measured once.
        student: The student's half.
        teacher: The teacher's half, or None where no quantity needs it.
        targets: [positions] the ids that stand there.
        vocab_size: Width of the logits; decides the tile.
        tile_positions: Positions a tile; None chooses from ``vocab_size``.
        base: The teacher's half without its online module, or None where no quantity needs it; a
            constant.

    Returns:
        [positions] a quantity. Gradient flows through the hidden states and the heads, to
        whichever model the quantity says; the values do not depend on the tile.
    """
    asked = tuple(dict.fromkeys(quantities))
    size = tile_positions or max(1, _TILE_ELEMENTS // vocab_size)

    def run(
        student_hidden: Tensor,
        teacher_hidden: Tensor | None,
        base_hidden: Tensor | None,
        ids: Tensor,
    ) -> tuple[Tensor, ...]:
        teacher_logits = None
        if teacher is not None and teacher_hidden is not None:
            teacher_logits = teacher.head(teacher_hidden)
        base_logits = None
        if base is not None and base_hidden is not None:
            with torch.no_grad():
                base_logits = base.head(base_hidden)
        tile = Tile(student.head(student_hidden), teacher_logits, ids, base_logits)
        return tuple(quantity.measure(tile) for quantity in asked)

    hidden = student.hidden.split(size)
    teacher_hidden, base_hidden = (
        side.hidden.split(size) if side is not None else [None] * len(hidden)
        for side in (teacher, base)
    )
    inputs = list(zip(hidden, teacher_hidden, base_hidden, targets.split(size), strict=True))
    if len(inputs) == 1 or not torch.is_grad_enabled():
        tiles = [run(*tile) for tile in inputs]
    else:
        tiles = [checkpoint(run, *tile, use_reentrant=False) for tile in inputs]
    return {
        quantity: torch.cat(values)
        for quantity, values in zip(asked, zip(*tiles, strict=True), strict=True)
    }
