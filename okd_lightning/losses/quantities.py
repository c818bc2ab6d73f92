"""Quantities that a method can measure: one number per token from both models' log-probabilities.

A quantity is a frozen, hashable object, so that two methods that need the same one share one
computation. Methods see these numbers and never logits.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from okd_lightning.divergences import Divergence, ForwardKL, LogProbPair, as_divergence
from okd_lightning.losses.closed_form import ModelRole, divergence_value, target_logprob
from okd_lightning.losses.end_outcome import EndOutcome
from okd_lightning.records.shapes import PositionIds, PositionMask, PositionValues


class Tile:
    """Some positions of a batch with both models' logits over the vocabulary.

    Softmaxes and other values that several quantities need are computed once. Several end ids are
    one outcome: ``logits``, all log-probabilities and ``targets`` have it under the first of these
    ids, and the others have log-probability -inf.

    Args:
        student_logits: [positions, vocab].
        teacher_logits: [positions, vocab], or None where no quantity needs the teacher; packed rows
            (``teacher_rows``) of a teacher that is known by k outcomes.
        targets: [positions] ids of the sampled or dataset tokens.
        base_logits: [positions, vocab] of the teacher's base (without its online module, or the
            module's ``teacher_base``), without gradient, or None where no quantity needs it.
        end_ids: Ids that mean "the response ends here".
        merges_ends: [positions] True where the sampler's log-probability of an end is that of all
            ends together, so that ``DrawnLogProb`` is too; None for nowhere.

    Attributes:
        targets: [positions] outcomes of the targets.
    """

    def __init__(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | None,
        targets: PositionIds,
        base_logits: Tensor | None = None,
        end_ids: Sequence[int] = (),
        merges_ends: PositionMask | None = None,
    ) -> None:
        self._raw = {"student": student_logits, "teacher": teacher_logits, "base": base_logits}
        self._ends = EndOutcome(end_ids, student_logits.device) if len(end_ids) > 1 else None
        self._merged: dict[str, Tensor] = {}
        self._target_ids, self._merges_ends = targets, merges_ends
        self.targets = targets if self._ends is None else self._ends.outcomes(targets)
        self._pairs: dict[float, LogProbPair] = {}

    def logits(self, role: ModelRole) -> Tensor:
        """Return [positions, vocab] logits of one model, float32 or wider, with gradient to it."""
        return self._logits_of(role)

    def _logits_of(self, side: str) -> Tensor:
        if self._ends is None:
            return self._wide(side)
        if side not in self._merged:
            self._merged[side] = self._ends.merge(self._wide(side))
        return self._merged[side]

    def _wide(self, side: str) -> Tensor:
        """Return [positions, vocab] logits before the merge of the ends, float32 or wider."""
        logits = self._raw[side]
        assert logits is not None
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    @property
    def teacher_rows(self) -> Tensor:
        """The packed rows of a teacher that is known by k outcomes, with its ends merged."""
        return self._wide("teacher")

    def target_share(self, role: ModelRole) -> PositionValues | None:
        """Return [positions] log-probability (nats) of the target's id given its outcome.

        0 where the target is not an end id, or where the sampler's log-probability is that of all
        end ids together. None if there is only one end id.
        """
        if self._ends is None:
            return None
        share = self._ends.log_share(self._wide(role), self._target_ids)
        return share if self._merges_ends is None else share.where(~self._merges_ends, 0.0)

    @cached_property
    def student_logprobs(self) -> Tensor:
        """[positions, vocab] nats, with gradient to the student."""
        return self.logits("student").log_softmax(-1)

    @cached_property
    def teacher_logprobs(self) -> Tensor:
        """[positions, vocab] nats, with gradient to the teacher if it is trained."""
        return self.logits("teacher").log_softmax(-1)

    @cached_property
    def base_logprobs(self) -> Tensor:
        """[positions, vocab] nats, of the teacher's base; a constant."""
        return self._base_at(1.0)

    def logprobs(self, role: ModelRole) -> Tensor:
        """Return the log-probabilities of one model."""
        return self.student_logprobs if role == "student" else self.teacher_logprobs

    def pair(self, temperature: float) -> LogProbPair:
        """Return both models' log-probabilities at a temperature, without gradient.

        Ids that are -inf on both sides get a finite log-probability and contribute 0.
        """
        if temperature not in self._pairs:
            pair = LogProbPair(
                self._constant_logprobs("student", temperature),
                self._constant_logprobs("teacher", temperature),
            )
            self._pairs[temperature] = pair if pair.is_finite else pair.without_common_gaps()
        return self._pairs[temperature]

    def shift_pair(self, temperature: float) -> LogProbPair:
        """Return the pair with the adapted teacher as student and its base as teacher."""
        base = self.base_logprobs if temperature == 1.0 else self._base_at(temperature)
        pair = LogProbPair(self._constant_logprobs("teacher", temperature), base)
        return pair if pair.is_finite else pair.without_common_gaps()

    def _base_at(self, temperature: float) -> Tensor:
        logits = self._logits_of("base").detach()
        return (logits / temperature if temperature != 1.0 else logits).log_softmax(-1)

    def _constant_logprobs(self, role: ModelRole, temperature: float) -> Tensor:
        if temperature == 1.0:
            return self.logprobs(role).detach()
        return (self.logits(role).detach() / temperature).log_softmax(-1)


class Quantity(ABC):
    """One number per token; subclass it to measure something new.

    A complete one, as a frozen dataclass:

        @dataclass(frozen=True)
        class TeacherTopMass(Quantity):
            needs_teacher = True

            def measure(self, tile: Tile) -> Tensor:
                return tile.teacher_logprobs.amax(-1).exp()

    Attributes:
        needs_teacher: True if the teacher must be run.
        trains_teacher: True if gradient flows to the teacher's online module.
        needs_base_teacher: True if the teacher's base must be run: the teacher without its online
            module, or the model of ``add_teacher_base``.
        reads_states: True if it is measured from states instead of logits (``StateQuantity``).
    """

    needs_teacher: bool
    trains_teacher: bool = False
    needs_base_teacher: bool = False
    reads_states: bool = False

    @abstractmethod
    def measure(self, tile: Tile) -> PositionValues:
        """Return [positions] values of a tile; the quantity decides where gradient flows."""


@dataclass(frozen=True)
class ExactDivergence(Quantity):
    """D(student, teacher) in nats, summed over the whole vocabulary.

    Gradient flows to ``learner`` only; the other model's distribution is a constant.

    Attributes:
        divergence: The divergence, with its own temperature or top-k.
        learner: The side that gets gradient.
    """

    divergence: Divergence
    learner: ModelRole = "student"
    needs_teacher = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "divergence", as_divergence(self.divergence))

    @cached_property
    def trains_teacher(self) -> bool:  # type: ignore[override]
        """True if the teacher is the learner."""
        return self.learner == "teacher"

    @cached_property
    def _temperature(self) -> float | None:
        return self.divergence.softmax_temperature

    def measure(self, tile: Tile) -> PositionValues:
        """[positions] nats."""
        temperature = self._temperature
        if temperature is not None and (pair := tile.pair(temperature)).is_finite:
            logits = tile.logits(self.learner)
            return divergence_value(self.divergence, pair, temperature, self.learner, logits)
        student, teacher = tile.student_logprobs, tile.teacher_logprobs
        if self.learner == "student":
            return self.divergence.value(student, teacher.detach())
        return self.divergence.value(student.detach(), teacher)


@dataclass(frozen=True)
class TeacherShift(Quantity):
    """D(adapted teacher, base teacher) in nats: the shift of the teacher by its online module.

    The adapted teacher takes the student's role in the divergence, the base the teacher's: with
    forward KL, the default, it is KL(base‖adapted). Gradient flows to the adapted teacher if
    ``learns``; the base is a constant, and the student is not used.
    """

    divergence: Divergence = field(default_factory=ForwardKL)
    learns: bool = False
    needs_teacher = True
    needs_base_teacher = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "divergence", as_divergence(self.divergence))

    @property
    def trains_teacher(self) -> bool:  # type: ignore[override]
        """True if the adapted teacher gets gradient."""
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
    """Log-probability (nats) of the target token, with gradient to the model of ``role``.

    With several end ids, a dataset target is the id itself, so that cross-entropy teaches the
    template's own end; a sampled token is the merged outcome, as in the sampler's log-probability.
    Where an engine gives only the id's (``DistillBatch.merges_ends``), it is the id in both.
    """

    role: ModelRole = "student"

    @property
    def needs_teacher(self) -> bool:  # type: ignore[override]
        """True for the teacher's log-probability."""
        return self.role == "teacher"

    @property
    def trains_teacher(self) -> bool:  # type: ignore[override]
        """True for the teacher's log-probability."""
        return self.role == "teacher"

    def measure(self, tile: Tile) -> PositionValues:
        """[positions] nats, at most 0."""
        found = target_logprob(tile.logits(self.role), tile.logprobs(self.role), tile.targets)
        share = tile.target_share(self.role)
        return found if share is None else found + share


@dataclass(frozen=True)
class DrawnOutcome(Quantity):
    """One side's log-probability (nats) of the target token as a divergence reads it, a constant.

    For most divergences it is the token's own; for a TopK that of the token's outcome.

    Attributes:
        role: The side whose log-probability is measured.
        divergence: The divergence whose ``drawn`` reads the token.
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
    """E_{a~p}[w_f(u)]: the value baseline of a position, a constant (vOPD, arXiv 2605.07865).

    Attributes:
        divergence: The divergence of f.
        max_log_ratio: The log-ratio is clipped to ± this many nats before w_f.
    """

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
    """Entropy (nats) of one model's next-token distribution, with gradient to it.

    Attributes:
        role: The side whose entropy is measured.
    """

    role: ModelRole = "student"

    @property
    def needs_teacher(self) -> bool:  # type: ignore[override]
        """True for the teacher's entropy."""
        return self.role == "teacher"

    def measure(self, tile: Tile) -> PositionValues:
        """[positions] nats, at least 0."""
        logprobs = tile.logprobs(self.role)
        finite = logprobs.masked_fill(logprobs == float("-inf"), 0.0)  # 0 · inf is NaN
        return -(logprobs.exp() * finite).sum(-1)


@dataclass(frozen=True)
class Agreement(Quantity):
    """1 where both models' most likely token is the same, else 0 (OKD, arXiv 2409.12512, Eq. 3)."""

    needs_teacher = True

    def measure(self, tile: Tile) -> PositionValues:
        """[positions] 0 or 1, without gradient."""
        same = tile.student_logprobs.argmax(-1) == tile.teacher_logprobs.argmax(-1)
        return same.to(tile.student_logprobs.dtype)
