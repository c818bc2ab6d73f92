"""Quantities at every position from hidden states, in bounded memory.

For evaluation, and for terms that need all positions of a batch at once. Logits exist for one tile
at a time: where a batch needs several tiles, each is recomputed in the backward pass (activation
checkpointing), so that memory does not grow with tokens × vocabulary. ``fused`` is the faster path
for positionwise terms.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from okd_lightning.losses.projection import Side, block_positions, slices, tile_size
from okd_lightning.losses.quantities import Quantity, Tile
from okd_lightning.records.shapes import PositionIds, PositionMask, PositionValues


def measure(
    quantities: Iterable[Quantity],
    student: Side,
    teacher: Side | None,
    targets: PositionIds,
    vocab_size: int,
    tile_positions: int | None = None,
    base: Side | None = None,
    merges_ends: PositionMask | None = None,
) -> dict[Quantity, PositionValues]:
    """Measure every quantity at every position.

    Args:
        quantities: Quantities; duplicates are measured once.
        student: The student's hidden states and head.
        teacher: The teacher's, or None where no quantity needs it.
        targets: [positions] ids of the target tokens.
        vocab_size: Width of the logits; determines the tile size.
        tile_positions: Positions per tile; None chooses from ``vocab_size``.
        base: The teacher's without its online module, or None where no quantity needs it; a
            constant.
        merges_ends: [positions] see ``Tile``.

    Returns:
        [positions] for each quantity. Gradient flows through the hidden states and heads of the
        models that the quantity trains. The values do not depend on the tile size.
    """
    asked = tuple(dict.fromkeys(quantities))
    device = student.hidden.device
    size = tile_positions or tile_size(vocab_size, device)
    block = block_positions(vocab_size, device)
    run = partial(_over_tile, asked, block, (student, teacher, base))
    hidden = student.hidden.split(size)
    teacher_hidden, base_hidden = (
        side.hidden.split(size) if side is not None else [None] * len(hidden)
        for side in (teacher, base)
    )
    merged = [None] * len(hidden) if merges_ends is None else merges_ends.split(size)
    inputs = list(
        zip(hidden, teacher_hidden, base_hidden, targets.split(size), merged, strict=True)
    )
    if len(inputs) == 1 or not torch.is_grad_enabled():
        tiles = [run(*tile) for tile in inputs]
    else:
        tiles = [checkpoint(run, *tile, use_reentrant=False) for tile in inputs]
    return {
        quantity: torch.cat(values)
        for quantity, values in zip(asked, zip(*tiles, strict=True), strict=True)
    }


def _over_tile(
    asked: tuple[Quantity, ...],
    block: int,
    sides: tuple[Side, Side | None, Side | None],
    student_hidden: Tensor,
    teacher_hidden: Tensor | None,
    base_hidden: Tensor | None,
    ids: Tensor,
    merged: Tensor | None,
) -> tuple[Tensor, ...]:
    """Measure every quantity of a tile from the hidden states of student, teacher and base."""
    student, teacher, base = sides
    teacher_logits = None
    if teacher is not None and teacher_hidden is not None:
        teacher_logits = teacher.head(teacher_hidden)
    base_logits = None
    if base is not None and base_hidden is not None:
        with torch.no_grad():
            base_logits = base.head(base_hidden)
    logits = (student.head(student_hidden), teacher_logits, base_logits)
    return _over_blocks(asked, block, logits, ids, student.end_ids, merged)


def _over_blocks(
    asked: tuple[Quantity, ...],
    block: int,
    logits: tuple[Tensor, Tensor | None, Tensor | None],
    targets: Tensor,
    end_ids: tuple[int, ...],
    merges_ends: Tensor | None,
) -> tuple[Tensor, ...]:
    """Measure every quantity of a tile, block by block; logits are student, teacher and base."""
    found: list[tuple[Tensor, ...]] = []
    for rows in slices(len(targets), block):
        of_student, of_teacher, of_base = (None if one is None else one[rows] for one in logits)
        assert of_student is not None
        merged = None if merges_ends is None else merges_ends[rows]
        tile = Tile(of_student, of_teacher, targets[rows], of_base, end_ids, merged)
        found.append(tuple(quantity.measure(tile) for quantity in asked))
    return tuple(torch.cat(values) for values in zip(*found, strict=True))
