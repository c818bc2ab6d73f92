"""What a method may ask for: one number a token, measured from both models' log-probabilities.

Owns the vocabulary of requests. A request is a frozen, hashable object, so that two methods that
ask for the same thing share one computation. Methods see these numbers and never logits.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from okd_lightning.divergences import Divergence, ForwardKL, LogProbPair, as_divergence
from okd_lightning.losses.closed_form import ModelRole, divergence_value, target_logprob
from okd_lightning.shapes import PositionIds, PositionValues


class Tile:
    """Some positions of a batch with both models' logits over the vocabulary.

    Softmaxes and what else several quantities need are computed once.

    Args:
        student_logits: [positions, vocab].
        teacher_logits: [positions, vocab], or None where nothing asks for the teacher.
        targets: [positions] the ids that were drawn or given.
        base_logits: [positions, vocab] of the teacher's base (without its online module, or the
            module's ``teacher_base``), without gradient, or None where nothing asks for it.
    """

    def __init__(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | None,
        targets: PositionIds,
        base_logits: Tensor | None = None,
    ) -> None:
        self._logits = {"student": student_logits, "teacher": teacher_logits}
        self._base_logits = base_logits
        self.targets = targets
        self._pairs: dict[float, LogProbPair] = {}

    def logits(self, role: ModelRole) -> Tensor:
        """[positions, vocab] of one model, float32 or wider, with gradient to it."""
        logits = self._logits[role]
        assert logits is not None
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    @cached_property
    def student_logprobs(self) -> Tensor:
        """[positions, vocab] nats, with gradient to the student."""
        return self.logits("student").log_softmax(-1)

    @cached_property
    def teacher_logprobs(self) -> Tensor:
        """[positions, vocab] nats, with gradient to the teacher where it learns."""
        return self.logits("teacher").log_softmax(-1)

    @cached_property
    def base_logprobs(self) -> Tensor:
        """[positions, vocab] nats, of the teacher's base; a constant."""
        return self._base_at(1.0)

    def logprobs(self, role: ModelRole) -> Tensor:
        """The log-probabilities of one model."""
        return self.student_logprobs if role == "student" else self.teacher_logprobs

    def pair(self, temperature: float) -> LogProbPair:
        """Both models' log-probabilities at a temperature, without gradient.

        Ids that neither side allows are given a finite log-probability, at which they count 0.
        """
        if temperature not in self._pairs:
            pair = LogProbPair(
                self._constant_logprobs("student", temperature),
                self._constant_logprobs("teacher", temperature),
            )
            self._pairs[temperature] = pair if pair.is_finite else pair.without_common_gaps()
        return self._pairs[temperature]

    def shift_pair(self, temperature: float) -> LogProbPair:
        """The adapted teacher in the student's place and its base in the teacher's."""
        base = self.base_logprobs if temperature == 1.0 else self._base_at(temperature)
        pair = LogProbPair(self._constant_logprobs("teacher", temperature), base)
        return pair if pair.is_finite else pair.without_common_gaps()

    def _base_at(self, temperature: float) -> Tensor:
        assert self._base_logits is not None
        logits = self._base_logits.detach()
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return (wide / temperature if temperature != 1.0 else wide).log_softmax(-1)

    def _constant_logprobs(self, role: ModelRole, temperature: float) -> Tensor:
        if temperature == 1.0:
            return self.logprobs(role).detach()
        return (self.logits(role).detach() / temperature).log_softmax(-1)


class Quantity(ABC):
    """One number a token; subclass it to measure something new.

    A frozen dataclass is the natural form:

        @dataclass(frozen=True)
        class TeacherTopMass(Quantity):
            needs_teacher = True

            def measure(self, tile: Tile) -> Tensor:
                return tile.teacher_logprobs.amax(-1).exp()

    Attributes:
        needs_teacher: Whether the teacher has to be run for it.
        trains_teacher: Whether gradient flows to the teacher's online module.
        needs_base_teacher: Whether the teacher's base has to be run: the teacher without its online
            module, or the model of ``add_teacher_base``.
    """

    needs_teacher: bool
    trains_teacher: bool = False
    needs_base_teacher: bool = False

    @abstractmethod
    def measure(self, tile: Tile) -> PositionValues:
        """[positions] from a tile; where gradient flows is the quantity's to say."""


@dataclass(frozen=True)
class ExactDivergence(Quantity):
    """D(student, teacher) in nats, summed over the whole vocabulary.

    Gradient flows to ``learner`` alone; the other model's distribution is a constant.
    """

    divergence: Divergence
    learner: ModelRole = "student"
    needs_teacher = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "divergence", as_divergence(self.divergence))

    @property
    def trains_teacher(self) -> bool:  # type: ignore[override]
        """Where the teacher is the learner."""
        return self.learner == "teacher"

    def measure(self, tile: Tile) -> PositionValues:
        """[positions] nats."""
        temperature = self.divergence.softmax_temperature
        if temperature is not None and (pair := tile.pair(temperature)).is_finite:
            logits = tile.logits(self.learner)
            return divergence_value(self.divergence, pair, temperature, self.learner, logits)
        student, teacher = tile.student_logprobs, tile.teacher_logprobs
        if self.learner == "student":
            return self.divergence.value(student, teacher.detach())
        return self.divergence.value(student.detach(), teacher)


@dataclass(frozen=True)
class TeacherShift(Quantity):
    """D(adapted teacher, base teacher) in nats: how far the online module has moved its teacher.

    The adapted teacher stands where the student does elsewhere, the base where the teacher does:
    with forward KL, the default, it is KL(base‖adapted). Gradient flows to the adapted teacher
    where it ``learns``; the base is a constant, and no student takes part.
    """

    divergence: Divergence = field(default_factory=ForwardKL)
    learns: bool = False
    needs_teacher = True
    needs_base_teacher = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "divergence", as_divergence(self.divergence))

    @property
    def trains_teacher(self) -> bool:  # type: ignore[override]
        """Where the adapted teacher learns from it."""
        return self.learns

    def measure(self, tile: Tile) -> PositionValues:
        """[positions] nats."""
        temperature = self.divergence.softmax_temperature
        if temperature is not None and (pair := tile.shift_pair(temperature)).is_finite:
            logits = tile.logits("teacher") if self.learns else tile.logits("teacher").detach()
            return divergence_value(self.divergence, pair, temperature, "student", logits)
        adapted = tile.teacher_logprobs
        return self.divergence.value(
            adapted if self.learns else adapted.detach(), tile.base_logprobs
        )


@dataclass(frozen=True)
class DrawnLogProb(Quantity):
    """Log-probability (nats) of the token that stands there, with gradient to ``role``."""

    role: ModelRole = "student"

    @property
    def needs_teacher(self) -> bool:  # type: ignore[override]
        """Only for the teacher's own log-probability."""
        return self.role == "teacher"

    @property
    def trains_teacher(self) -> bool:  # type: ignore[override]
        """Only the teacher's own log-probability."""
        return self.role == "teacher"

    def measure(self, tile: Tile) -> PositionValues:
        """[positions] nats, at most 0."""
        return target_logprob(tile.logits(self.role), tile.logprobs(self.role), tile.targets)


@dataclass(frozen=True)
class DrawnOutcome(Quantity):
    """The token that stands there as a divergence sees it: one side's log-prob, a constant.

    For most divergences the log-prob itself; for a TopK that of the outcome it belongs to.
    """

    role: ModelRole
    divergence: Divergence
    needs_teacher = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "divergence", as_divergence(self.divergence))

    @torch.no_grad()
    def measure(self, tile: Tile) -> PositionValues:
        """[positions] nats, at most 0, without gradient."""
        student, teacher = self.divergence.drawn(
            tile.student_logprobs, tile.teacher_logprobs, tile.targets
        )
        return student if self.role == "student" else teacher


@dataclass(frozen=True)
class ExpectedWeight(Quantity):
    """E_{a~p}[w_f(u)]: the value baseline of a state, a constant (vOPD, arXiv 2605.07865)."""

    divergence: Divergence
    max_log_ratio: float = math.inf
    needs_teacher = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "divergence", as_divergence(self.divergence))

    def measure(self, tile: Tile) -> PositionValues:
        """[positions] nats, without gradient."""
        return self.divergence.expected_weight(
            tile.student_logprobs, tile.teacher_logprobs, self.max_log_ratio
        )


@dataclass(frozen=True)
class Entropy(Quantity):
    """Entropy (nats) of one model's next-token distribution, with gradient to it."""

    role: ModelRole = "student"

    @property
    def needs_teacher(self) -> bool:  # type: ignore[override]
        """Only for the teacher's entropy."""
        return self.role == "teacher"

    def measure(self, tile: Tile) -> PositionValues:
        """[positions] nats, at least 0."""
        logprobs = tile.logprobs(self.role)
        finite = logprobs.masked_fill(logprobs == float("-inf"), 0.0)  # 0 · inf, also backward
        return -(logprobs.exp() * finite).sum(-1)


@dataclass(frozen=True)
class Agreement(Quantity):
    """1 where both models' most likely token is the same, else 0 (OKD, arXiv 2409.12512, Eq. 3)."""

    needs_teacher = True

    def measure(self, tile: Tile) -> PositionValues:
        """[positions] 0 or 1, without gradient."""
        same = tile.student_logprobs.argmax(-1) == tile.teacher_logprobs.argmax(-1)
        return same.to(tile.student_logprobs.dtype)
