"""Quantities of hidden states and routers, and the distance between two models' hidden states.

They are measured once for all positions of a batch, from tensors taken during both models' passes,
and not tile by tile: no logits are involved.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from okd_lightning.errors import ConfigError
from okd_lightning.losses.closed_form import ModelRole
from okd_lightning.losses.fused import batch_loss
from okd_lightning.losses.projection import Side
from okd_lightning.losses.quantities import Quantity, Tile
from okd_lightning.losses.terms import (
    Measured,
    Term,
    WeightedLoss,
    WeightedTerm,
    weighted_loss,
)
from okd_lightning.records.batches import DistillBatch
from okd_lightning.records.shapes import PositionIds, PositionValues
from okd_lightning.records.states import Routing, States

HiddenLoss: TypeAlias = Literal["mse", "cosine"]
"""Distance of two hidden states; see ``HiddenDistance``."""

Project: TypeAlias = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
"""Applies the projectors to the student's states, by the projectors' names."""


class StateQuantity(Quantity):
    """One number per token from states instead of logits.

    Attributes:
        student_layers: Layers of the student that are read.
        teacher_layers: Layers of the teacher that are read.
        reads_routers: True if the student's routers are read.
        projectors: Names of the projectors that are applied to the student's states.
    """

    reads_states = True
    student_layers: tuple[int, ...] = ()
    teacher_layers: tuple[int, ...] = ()
    reads_routers: bool = False
    projectors: tuple[str, ...] = ()

    def measure(self, tile: Tile) -> PositionValues:
        """Raise: the quantity cannot be computed from logits."""
        raise ConfigError(
            f"{type(self).__name__} is measured from states and not from logits: a method has "
            "quantities of one kind"
        )

    @abstractmethod
    def measure_states(
        self, student: States, teacher: States | None, rows: Tensor, project: Project | None
    ) -> PositionValues:
        """Return [positions] values.

        Args:
            student: The student's states, with gradient.
            teacher: The teacher's; None where no quantity needs it.
            rows: [positions] row of each loss position.
            project: Applies the run's projectors; None where it has none.
        """


def layers_read(quantities: Iterable[Quantity], role: ModelRole) -> tuple[int, ...]:
    """Return the layers of one model that some quantities read, in order."""
    name = f"{role}_layers"
    states = [q for q in quantities if isinstance(q, StateQuantity)]
    return tuple(sorted({layer for quantity in states for layer in getattr(quantity, name)}))


def routers_read(quantities: Iterable[Quantity], role: ModelRole) -> bool:
    """Return whether some quantities read the routers of one model."""
    states = [q for q in quantities if isinstance(q, StateQuantity)]
    return role == "student" and any(quantity.reads_routers for quantity in states)


def projectors_of(terms: Iterable[Term]) -> set[str]:
    """Return the names of the projectors that some terms train."""
    quantities = [quantity for term in terms for quantity in term.quantities]
    states = [quantity for quantity in quantities if isinstance(quantity, StateQuantity)]
    return {name for quantity in states for name in quantity.projectors}


@dataclass(frozen=True)
class HiddenDistance(StateQuantity):
    """Mean over pairs of layers of the distance between W h_S and h_T, h_T a constant.

    mse: ‖W h_S - h_T‖² / ‖h_T‖². cosine: 1 - cos(W h_S, h_T), as half the squared distance of the
    unit vectors, which is exactly 0, with gradient exactly 0, for equal states. Each is normalised
    at its own position, so that it does not depend on the division of a batch. Without a projector
    W is the identity. Gradient flows to the student and to W.

    Attributes:
        pairs: (student's layer, teacher's layer).
        loss: "mse" or "cosine".
        name: The method's name, which is part of the projectors' names.
    """

    pairs: tuple[tuple[int, int], ...]
    loss: HiddenLoss = "mse"
    name: str = "hidden_states"
    needs_teacher = True

    @property
    def student_layers(self) -> tuple[int, ...]:  # type: ignore[override]
        """The student's layers."""
        return tuple(student for student, _ in self.pairs)

    @property
    def teacher_layers(self) -> tuple[int, ...]:  # type: ignore[override]
        """The teacher's layers."""
        return tuple(teacher for _, teacher in self.pairs)

    @property
    def projectors(self) -> tuple[str, ...]:  # type: ignore[override]
        """Names of the projectors of all pairs; those of equal widths do not exist."""
        return tuple(map(self.projector, self.pairs))

    def projector(self, pair: tuple[int, int]) -> str:
        """Return the name of a pair's projector."""
        return f"{self.name}_{pair[0]}_{pair[1]}"

    def measure_states(
        self, student: States, teacher: States | None, rows: Tensor, project: Project | None
    ) -> PositionValues:
        """Return [positions] mean distances."""
        assert teacher is not None
        del rows
        given = {self.projector(pair): student.layers[pair[0]] for pair in self.pairs}
        mapped = given if project is None else project(given)
        found = [
            self._distance(mapped[self.projector(pair)], teacher.layers[pair[1]].detach())
            for pair in self.pairs
        ]
        return torch.stack(found).mean(0)

    def _distance(self, own: Tensor, wanted: Tensor) -> Tensor:
        own, wanted = (_wide(state) for state in (own, wanted))
        tiny = torch.finfo(wanted.dtype).tiny
        if self.loss == "mse":
            size = wanted.square().sum(-1).clamp_min(tiny)
            return (own - wanted).square().sum(-1) / size
        own, wanted = (
            state / state.norm(dim=-1, keepdim=True).clamp_min(tiny) for state in (own, wanted)
        )
        return (own - wanted).square().sum(-1) / 2


@dataclass(frozen=True)
class RouterBalance(StateQuantity):
    """Balance of the experts in a token's row: 1 where all get equal shares, E where one gets all.

    E Σ_e f_e P_e (Switch Transformer, arXiv 2101.03961, Eqs. 4-6), mean over MoE layers: f_e is the
    share of the row's assignments that go to expert e, a constant; P_e the mean over the row's real
    tokens of the softmax of the raw router logits. The product is not linear in the batch, so it is
    taken for each row: then it does not depend on the division of a batch.
    """

    needs_teacher = False
    reads_routers = True

    def measure_states(
        self, student: States, teacher: States | None, rows: Tensor, project: Project | None
    ) -> PositionValues:
        """Return [positions] the value of each position's row."""
        del teacher, project
        found = [_balance(routing) for routing in student.routings]
        return torch.stack(found).mean(0)[rows]


def _balance(routing: Routing) -> Tensor:
    """Return [rows] the balance of one layer."""
    logits = _wide(routing.logits)
    # a product instead of index_add, whose order of summation differs between runs on GPUs
    member = one_hot(routing.row, routing.num_rows).to(logits.dtype).T
    num_tokens = member.sum(-1, keepdim=True).clamp_min(1)
    num = logits.shape[-1]
    assigned = one_hot(routing.chosen, num).sum(1).to(logits.dtype)
    share = member @ assigned / (num_tokens * routing.chosen.shape[-1])
    mean = member @ logits.softmax(-1) / num_tokens
    return num * (share * mean).sum(-1)


def _wide(state: Tensor) -> Tensor:
    return state.to(torch.promote_types(state.dtype, torch.float32))


def loss_with_states(
    terms: Sequence[WeightedTerm],
    sides: tuple[Side, Side | None, Side | None],
    batch: DistillBatch,
    targets: PositionIds,
    about: Measured,
    vocab_size: int,
    tile_positions: int | None,
    checks: bool,
    project: Project | None,
) -> WeightedLoss:
    """Return the weighted loss of a micro-batch where some terms are measured from states.

    Args:
        terms: All terms, in the order of the outputs.
        sides: Student, teacher and base teacher; None where no quantity needs one.
        batch: The rows.
        targets: [positions] ids of the target tokens.
        about: Source, row and sampler of the positions; its values are not read.
        vocab_size: Width of the logits.
        tile_positions: Positions per tile; None chooses from the sizes.
        checks: Check that terms are positionwise, as they declare.
        project: Applies the run's projectors; None where it has none.

    Raises:
        ConfigError: A term has quantities of both kinds.
    """
    of_states = [weighted for weighted in terms if _reads_states(weighted)]
    others = [weighted for weighted in terms if not weighted.term.reads_states]
    parts = [(of_states, _loss_of_states(of_states, sides, about, project))]
    if others:
        student, teacher, base = sides
        needs_teacher = any(q.needs_teacher for one in others for q in one.term.quantities)
        read = student, teacher if needs_teacher else None, base
        sizes = vocab_size, tile_positions, checks
        found = batch_loss(others, read, batch, targets, about, *sizes)
        parts.append((others, found))
    outputs = {
        weighted.term.name: output
        for members, loss in parts
        for weighted, output in zip(members, loss.outputs, strict=True)
    }
    total = torch.stack([loss.total for _, loss in parts]).sum()
    return WeightedLoss(total, tuple(outputs[weighted.term.name] for weighted in terms))


def _reads_states(weighted: WeightedTerm) -> bool:
    """Return whether a term is measured from states.

    Raises:
        ConfigError: It has quantities of both kinds.
    """
    kinds = {quantity.reads_states for quantity in weighted.term.quantities}
    if len(kinds) > 1:
        raise ConfigError(
            f"method {weighted.term.name}: its quantities are of states and of logits; make two "
            "methods of it, one for each kind"
        )
    return kinds == {True}


def _loss_of_states(
    terms: Sequence[WeightedTerm],
    sides: tuple[Side, Side | None, Side | None],
    about: Measured,
    project: Project | None,
) -> WeightedLoss:
    student, teacher, _ = sides
    assert student.states is not None
    of_teacher = None if teacher is None else teacher.states
    values: dict[Quantity, Tensor] = {
        quantity: quantity.measure_states(student.states, of_teacher, about.row, project)
        for weighted in terms
        for quantity in weighted.term.quantities
        if isinstance(quantity, StateQuantity)
    }
    return weighted_loss(terms, replace(about, values=values))
