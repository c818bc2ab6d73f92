"""The loss of one micro-batch from both models' sides.

Owns which terms take which path: one pass over tiles of logits, all positions at once (terms that
are not positionwise), chunks (a teacher with another tokenizer), or hidden states and routers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from okd_lightning.losses import (
    Measured,
    Quantity,
    Side,
    StateQuantity,
    WeightedLoss,
    WeightedTerm,
    chunked_loss,
    fused_loss,
    measure,
    measure_chunks,
    weighted_loss,
)
from okd_lightning.losses.states import Project, joined, reads_states
from okd_lightning.records.batches import DistillBatch

Sides = tuple[Side, Side | None, Side | None]
"""Student, teacher, base teacher; None where no quantity needs one."""


def batch_loss(
    terms: Sequence[WeightedTerm],
    sides: Sides,
    batch: DistillBatch,
    vocab_size: int,
    tile_positions: int | None,
    checks: bool,
    project: Project | None,
) -> WeightedLoss:
    """Return the weighted sum of the terms over a micro-batch.

    Args:
        terms: The terms, in the form for this teacher.
        sides: Both models' sides, for the terms' quantities.
        batch: The rows.
        vocab_size: Width of the logits.
        tile_positions: Positions a tile; None chooses from the sizes.
        checks: Check that terms are positionwise, as they declare.
        project: Applies the run's projectors; None where it has none.
    """
    of_states = [weighted for weighted in terms if reads_states(weighted)]
    others = [weighted for weighted in terms if not reads_states(weighted)]
    parts: list[tuple[Sequence[WeightedTerm], WeightedLoss]] = []
    if others:
        found = _loss_of_logits(others, sides, batch, vocab_size, tile_positions, checks)
        parts.append((others, found))
    if of_states:
        parts.append((of_states, _loss_of_states(of_states, sides, batch, project)))
    return parts[0][1] if len(parts) == 1 else joined(terms, parts)


def _loss_of_logits(
    terms: Sequence[WeightedTerm],
    sides: Sides,
    batch: DistillBatch,
    vocab_size: int,
    tile_positions: int | None,
    checks: bool,
) -> WeightedLoss:
    student, teacher, base = sides
    quantities = _quantities(terms)
    teacher = teacher if any(quantity.needs_teacher for quantity in quantities) else None
    targets, about = batch.student_reads.targets, Measured.about(batch)
    if batch.chunks is not None:
        return chunked_loss(terms, about, measure_chunks(batch, quantities, sides, tile_positions))
    if all(weighted.term.is_positionwise for weighted in terms):
        return fused_loss(
            terms, student, teacher, targets, about, vocab_size, tile_positions, base, checks
        )
    values = measure(
        quantities, student, teacher, targets, vocab_size, tile_positions, base, about.merges_ends
    )
    return weighted_loss(terms, replace(about, values=values))


def _loss_of_states(
    terms: Sequence[WeightedTerm], sides: Sides, batch: DistillBatch, project: Project | None
) -> WeightedLoss:
    student, teacher, _ = sides
    assert student.states is not None
    of_teacher = None if teacher is None else teacher.states
    about = Measured.about(batch)
    values: dict[Quantity, Tensor] = {
        quantity: quantity.measure_states(student.states, of_teacher, about.row, project)
        for quantity in dict.fromkeys(_quantities(terms))
        if isinstance(quantity, StateQuantity)
    }
    return weighted_loss(terms, replace(about, values=values))


def _quantities(terms: Sequence[WeightedTerm]) -> list[Quantity]:
    return [quantity for weighted in terms for quantity in weighted.term.quantities]
