"""The training loss with its gradient from one pass over tiles of positions.

A term's loss is a sum over positions, and its factor is known before the backward pass. Each tile
is therefore projected, measured, summed, differentiated to the hidden states and the heads' trained
parameters, and released. Nothing is computed twice, and memory does not grow with tokens ×
vocabulary. Within a tile, vocabulary-wide work runs over blocks that fit a processor's cache.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from okd_lightning.losses.chunked import chunked_loss, measure_chunks
from okd_lightning.losses.exact import measure
from okd_lightning.losses.projection import (
    Projection,
    Side,
    block_positions,
    projection,
    slices,
    tile_size,
)
from okd_lightning.losses.quantities import Quantity, Tile
from okd_lightning.losses.terms import (
    Measured,
    WeightedLoss,
    WeightedTerm,
    check_positionwise,
    weighted_loss,
)
from okd_lightning.records.batches import DistillBatch, LossOutput
from okd_lightning.records.shapes import PositionIds


class _GradientInForward(torch.autograd.Function):
    """A scalar with precomputed gradients, times ``unit``: the backward pass only scales them.

    Gradients of float16 inputs are kept in float32 until the backward pass has applied the loss
    scaler's factor, which brings them into float16's range.
    """

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, gradients: list[Tensor], unit: float, *inputs: Tensor
    ) -> Tensor:
        ctx.save_for_backward(*gradients)
        ctx.unit, ctx.dtypes = unit, [tensor.dtype for tensor in inputs]
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        factor = scale / ctx.unit
        # the usual 1 needs no copy of a head's gradient; on a GPU, asking would wait for the device
        is_one = factor.device.type == "cpu" and factor.item() == 1
        scaled = (g if is_one else g * factor.to(g.dtype) for g in ctx.saved_tensors)
        found = (gradient.to(dtype) for gradient, dtype in zip(scaled, ctx.dtypes, strict=True))
        return None, None, None, *found


def _unit(terms: Sequence[WeightedTerm]) -> float:
    """Return a power of two that scales the terms' factors, 1 / thousands of tokens, close to 1.

    Gradients are computed times this unit, so that a head in float16 does not round them to zero.
    """
    largest = max((abs(weighted.factor) for weighted in terms), default=0.0)
    return 2.0 ** -math.frexp(largest)[1] if largest > 0 else 1.0


class _Run:
    """Running sums of one micro-batch over its tiles."""

    def __init__(
        self, terms: Sequence[WeightedTerm], sides: Mapping[str, Projection], checks: bool
    ) -> None:
        self.terms, self.names, self.sides = terms, list(sides), list(sides.values())
        self.end_ids = sides["student"].side.end_ids
        self.quantities = dict.fromkeys(q for weighted in terms for q in weighted.term.quantities)
        self.outputs: list[LossOutput] = []
        self.unit, self.checks = 1.0, checks

    def add_tile(self, tile: slice, block: int, targets: Tensor, about: Measured) -> None:
        """Add one tile: heads forward, vocabulary-wide work by blocks, heads backward."""
        raw = [side.project(tile) for side in self.sides]
        if any(outputs.dtype == torch.float16 for outputs in raw):
            self.unit = _unit(self.terms)
        for rows in slices(tile.stop - tile.start, block):
            positions = slice(tile.start + rows.start, tile.start + rows.stop)
            self._add_block([r[rows] for r in raw], targets[positions], about, positions)
        for side, gradient in zip(self.sides, raw, strict=True):
            if side.learns:
                side.pull_back(tile, gradient)

    def _add_block(
        self, raw: list[Tensor], targets: Tensor, about: Measured, positions: slice
    ) -> None:
        """Measure, sum and differentiate; overwrite a learning side's outputs by their gradient."""
        learns = [side.learns for side in self.sides]
        with torch.set_grad_enabled(any(learns)):
            leaves = [r.detach().requires_grad_(own) for r, own in zip(raw, learns, strict=True)]
            logits = {
                name: projected.finish(leaf)
                for name, projected, leaf in zip(self.names, self.sides, leaves, strict=True)
            }
            tile = Tile(
                logits["student"],
                logits.get("teacher"),
                targets,
                logits.get("base"),
                self.end_ids,
                None if about.merges_ends is None else about.merges_ends[positions],
            )
            values = {quantity: quantity.measure(tile) for quantity in self.quantities}
            measured = about.part(positions, values)
            loss = weighted_loss(self.terms, measured)
            if self.checks:
                check_positionwise(self.terms, measured, loss.outputs)
            total = loss.total * self.unit
        self._add(loss.outputs)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        for leaf, gradient in zip(wanted, _gradients(total, wanted), strict=True):
            # in place, in the memory of ``raw``: no second buffer of logits
            leaf.detach().copy_(gradient)

    def _add(self, outputs: Sequence[LossOutput]) -> None:
        known = self.outputs
        self.outputs = (
            [a + b for a, b in zip(known, outputs, strict=True)] if known else list(outputs)
        )

    def result(self) -> WeightedLoss:
        """Return the loss, connected in autograd to all inputs that have gradients."""
        parts = [w.factor * o.sum for w, o in zip(self.terms, self.outputs, strict=True)]
        total = torch.stack(parts).sum()
        inputs = [tensor for side in self.sides for tensor in side.inputs]
        if inputs:
            gradients = [gradient for side in self.sides for gradient in side.gradients]
            total = _GradientInForward.apply(total, gradients, self.unit, *inputs)
        return WeightedLoss(total, tuple(self.outputs))


def fused_loss(
    terms: Sequence[WeightedTerm],
    student: Side,
    teacher: Side | None,
    targets: PositionIds,
    about: Measured,
    vocab_size: int,
    tile_positions: int | None = None,
    base: Side | None = None,
    checks: bool = False,
) -> WeightedLoss:
    """Return the weighted loss of a micro-batch whose terms are all positionwise.

    Args:
        terms: The terms and their factors.
        student: The student's hidden states and head.
        teacher: The teacher's, or None where no term needs it.
        targets: [positions] ids of the target tokens.
        about: Source, row and sampler of the positions; its values are not read.
        vocab_size: Width of the logits.
        tile_positions: Positions per tile; None chooses from the sizes.
        base: The teacher's without its online module, or None where no term needs it; a constant.
        checks: Check that the terms are positionwise, as they declare; costs a little time.

    Returns:
        The loss and each term's sums. Gradient flows through the hidden states that require it and
        to the heads' trained parameters. The gradients are computed here; the backward pass through
        ``total`` only scales them, and cannot be differentiated again.
    """
    given = {"student": student, "teacher": teacher}
    sides = {n: projection(side, vocab_size) for n, side in given.items() if side is not None}
    if base is not None:
        with torch.no_grad():
            sides["base"] = projection(base, vocab_size)
    size = tile_positions or tile_size(vocab_size, student.hidden.device)
    block = block_positions(vocab_size, student.hidden.device)
    tiles = slices(len(targets), size)
    run = _Run(terms, sides, checks)
    with torch.no_grad():
        for tile in tiles:
            run.add_tile(tile, block, targets, about)
    return run.result()


def measure_batch(
    quantities: Sequence[Quantity],
    sides: tuple[Side, Side | None, Side | None],
    batch: DistillBatch,
    targets: PositionIds,
    about: Measured,
    vocab_size: int,
    tile_positions: int | None,
) -> Measured:
    """Return ``about`` with the values of quantities at all positions of a micro-batch.

    Where the teacher has another tokenizer, values of chunks are at their first positions.

    Args:
        quantities: Quantities to measure, from logits.
        sides: Student, teacher and base teacher; None where no quantity needs one.
        batch: The rows.
        targets: [positions] ids of the target tokens.
        about: Source, row and sampler of the positions; its values are not read.
        vocab_size: Width of the logits.
        tile_positions: Positions per tile; None chooses from the sizes.

    Returns:
        [positions] per quantity, with gradient to the sides that the quantity trains.
    """
    student, teacher, base = sides
    if batch.chunks is not None:
        values = measure_chunks(batch, quantities, sides, tile_positions).at_positions()
    else:
        sizes = vocab_size, tile_positions
        values = measure(quantities, student, teacher, targets, *sizes, base, about.merges_ends)
    return replace(about, values=values)


def batch_loss(
    terms: Sequence[WeightedTerm],
    sides: tuple[Side, Side | None, Side | None],
    batch: DistillBatch,
    targets: PositionIds,
    about: Measured,
    vocab_size: int,
    tile_positions: int | None,
    checks: bool,
) -> WeightedLoss:
    """Return the weighted loss of a micro-batch, by the path that its terms and rows need.

    One pass over tiles where all terms are positionwise; else all positions at once; chunks where
    the teacher has another tokenizer.

    Args:
        terms: The terms and their factors, measured from logits.
        sides: Student, teacher and base teacher; None where no quantity needs one.
        batch: The rows.
        targets: [positions] ids of the target tokens.
        about: Source, row and sampler of the positions; its values are not read.
        vocab_size: Width of the logits.
        tile_positions: Positions per tile; None chooses from the sizes.
        checks: Check that terms are positionwise, as they declare.
    """
    student, teacher, base = sides
    if batch.chunks is None and all(weighted.term.is_positionwise for weighted in terms):
        return fused_loss(
            terms, student, teacher, targets, about, vocab_size, tile_positions, base, checks
        )
    quantities = [quantity for weighted in terms for quantity in weighted.term.quantities]
    if batch.chunks is not None:
        return chunked_loss(terms, about, measure_chunks(batch, quantities, sides, tile_positions))
    given = quantities, sides, batch, targets, about, vocab_size, tile_positions
    return weighted_loss(terms, measure_batch(*given))


def _gradients(total: Tensor, wanted: list[Tensor]) -> Sequence[Tensor]:
    if not wanted:
        return ()
    if not total.requires_grad:
        return tuple(torch.zeros_like(leaf) for leaf in wanted)
    return torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=True)
