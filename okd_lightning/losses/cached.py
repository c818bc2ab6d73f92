"""Quantities of a teacher that is known by k ids and the rest only.

A cached teacher's rows are packed (``outcomes.pack_outcomes``). Owns the forms of quantities that
can be computed from them; does not own the storage of the rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from okd_lightning.divergences import Divergence, LogProbPair, Tempered, TopK
from okd_lightning.divergences.top_k import merged
from okd_lightning.errors import ConfigError
from okd_lightning.losses.closed_form import ModelRole, outcome_value
from okd_lightning.losses.outcomes import (
    first_outcomes,
    outcomes,
    unpack_drawn,
    unpack_outcomes,
)
from okd_lightning.losses.quantities import (
    Agreement,
    DrawnOutcome,
    ExactDivergence,
    ExpectedWeight,
    Quantity,
    Tile,
)
from okd_lightning.records.shapes import PositionValues


@dataclass(frozen=True)
class CachedDivergence(Quantity):
    """TopK(divergence, k) with a teacher given as packed rows; at most the exact divergence.

    Gradient flows to the student; the teacher is a constant.

    Args:
        divergence: Divergence between the k + 1 outcomes.
        k: Ids that keep their own probability, at most those of the rows.
    """

    divergence: Divergence
    k: int
    needs_teacher = True

    def measure(self, tile: Tile) -> PositionValues:
        """[positions] nats."""
        ids, teacher = first_outcomes(*unpack_outcomes(tile.teacher_rows), self.k)
        logits, logprobs = tile.logits("student"), tile.student_logprobs.detach()
        pair = LogProbPair(merged(logprobs, ids), teacher)
        if pair.is_finite:
            return outcome_value(self.divergence, pair, ids, logprobs, 1.0, "student", logits)
        return self.divergence.value(outcomes(logits, logprobs, ids), teacher)


@dataclass(frozen=True)
class CachedAgreement(Quantity):
    """1 where both models' most likely token is the same, else 0: exact, from the first id."""

    needs_teacher = True

    def measure(self, tile: Tile) -> PositionValues:
        """[positions] 0 or 1, without gradient."""
        ids, _ = unpack_outcomes(tile.teacher_rows)
        return (tile.student_logprobs.argmax(-1) == ids[:, 0]).to(tile.student_logprobs.dtype)


@dataclass(frozen=True)
class CachedDrawnOutcome(Quantity):
    """One side's log-probability (nats) of the target token, or of its outcome.

    Args:
        role: The side.
        k: Outcomes are the teacher's k most likely ids and the rest, as in a TopK; None for the
            token itself, whose log-probability is in the rows.
    """

    role: ModelRole
    k: int | None = None
    needs_teacher = True

    @torch.no_grad()
    def measure(self, tile: Tile) -> PositionValues:
        """[positions] nats, at most 0, without gradient."""
        rows, student, at = tile.teacher_rows, tile.student_logprobs, tile.targets[:, None]
        if self.k is None:
            is_student = self.role == "student"
            return student.gather(-1, at)[:, 0] if is_student else unpack_drawn(rows)
        ids, known = first_outcomes(*unpack_outcomes(rows), self.k)
        if self.role == "student":
            known = outcomes(tile.logits("student"), student, ids)
        is_it = ids == at
        place = torch.where(is_it.any(-1), is_it.int().argmax(-1), ids.shape[-1])
        return known.gather(-1, place[:, None])[:, 0]


@dataclass(frozen=True)
class CachedExpectedWeight(Quantity):
    """E_p[w_f(u)] over k ids of the teacher and the rest: a baseline for the exact advantage.

    It does not depend on the sampled token, so subtracting it leaves the expected gradient
    unchanged. Its variance differs from that of the exact mean.

    Attributes:
        divergence: The divergence of f.
        k: Known ids of the teacher that keep their own probability.
        max_log_ratio: The log-ratio is clipped to ± this many nats before w_f.
    """

    divergence: Divergence
    k: int
    max_log_ratio: float = math.inf
    needs_teacher = True

    @torch.no_grad()
    def measure(self, tile: Tile) -> PositionValues:
        """[positions] nats, without gradient."""
        ids, teacher = first_outcomes(*unpack_outcomes(tile.teacher_rows), self.k)
        student = outcomes(tile.logits("student"), tile.student_logprobs, ids)
        return self.divergence.expected_weight(student, teacher, self.max_log_ratio)


_FORMS = (CachedDivergence, CachedAgreement, CachedDrawnOutcome, CachedExpectedWeight)


def cached_form(quantity: Quantity, k: int, vocab_size: int) -> Quantity:
    """Return the form of a quantity for a teacher known by k ids and the rest.

    A divergence becomes its TopK; a TopK stays unchanged. Log-probabilities of sampled tokens stay
    exact. An expected weight becomes one over outcomes, another valid baseline.

    Raises:
        ConfigError: The quantity needs the teacher's whole distribution.
    """
    if not quantity.needs_teacher or isinstance(quantity, _FORMS):
        return quantity
    if isinstance(quantity, Agreement):
        return CachedAgreement()
    if isinstance(quantity, (DrawnOutcome, ExpectedWeight)):
        known = _cached_divergence(quantity.divergence, k, vocab_size)
        if isinstance(quantity, ExpectedWeight):
            return CachedExpectedWeight(known.divergence, known.k, quantity.max_log_ratio)
        is_merged = isinstance(quantity.divergence, TopK)
        return CachedDrawnOutcome(quantity.role, known.k if is_merged else None)
    if not isinstance(quantity, ExactDivergence) or quantity.learner != "student":
        raise ConfigError(
            f"it asks for {type(quantity).__name__}, for which the teacher has to be run"
        )
    return _cached_divergence(quantity.divergence, k, vocab_size)


def _cached_divergence(divergence: Divergence, k: int, vocab_size: int) -> CachedDivergence:
    known = min(k, vocab_size)
    if isinstance(divergence, Tempered):
        raise ConfigError(
            f"its temperature is {divergence.temperature:g}, and k probabilities at temperature 1 "
            "do not determine a tempered distribution; set its temperature to 1"
        )
    if isinstance(divergence, TopK):
        if divergence.side != "teacher":
            raise ConfigError(
                "its TopK is over the student's most likely ids, for which the teacher's values "
                "are not known"
            )
        wanted = min(divergence.k, vocab_size)
        if wanted > known:
            raise ConfigError(
                f"its TopK takes {wanted} ids, and {known} are known of this teacher: raise "
                "--model.teacher.k, or lower the method's k"
            )
        divergence, known = divergence.divergence, wanted
    if divergence.softmax_temperature != 1.0 or isinstance(divergence, TopK):
        raise ConfigError(
            f"{type(divergence).__name__} changes the distributions that it compares, which needs "
            "all of the teacher's"
        )
    return CachedDivergence(divergence, known)
