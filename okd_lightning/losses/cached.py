"""What can be measured where k ids and the rest are all that is known of the teacher.

A cached teacher's rows come packed (``outcomes.pack_outcomes``). Owns which quantities can be read
from them, and as what; where the rows lie is not its business.
"""

from __future__ import annotations

from dataclasses import dataclass

from okd_lightning.divergences import Divergence, Tempered, TopK
from okd_lightning.errors import ConfigError
from okd_lightning.losses.outcomes import first_outcomes, outcomes, unpack_outcomes
from okd_lightning.losses.quantities import Agreement, ExactDivergence, Quantity, Tile
from okd_lightning.shapes import PositionValues


@dataclass(frozen=True)
class CachedDivergence(Quantity):
    """TopK(divergence, k) of a teacher that comes as packed rows: at most the exact one.

    Gradient flows to the student; the teacher is a constant.

    Args:
        divergence: What is measured between the k + 1 outcomes.
        k: Ids that keep their own probability, at most those of the rows.
    """

    divergence: Divergence
    k: int
    needs_teacher = True

    def measure(self, tile: Tile) -> PositionValues:
        """[positions] nats."""
        ids, teacher = first_outcomes(*unpack_outcomes(tile.logits("teacher")), self.k)
        student = outcomes(tile.logits("student"), tile.student_logprobs, ids)
        return self.divergence.value(student, teacher)


@dataclass(frozen=True)
class CachedAgreement(Quantity):
    """1 where both models' most likely token is the same, else 0: exact, from the first id."""

    needs_teacher = True

    def measure(self, tile: Tile) -> PositionValues:
        """[positions] 0 or 1, without gradient."""
        ids, _ = unpack_outcomes(tile.logits("teacher"))
        return (tile.student_logprobs.argmax(-1) == ids[:, 0]).to(tile.student_logprobs.dtype)


def cached_form(quantity: Quantity, k: int, vocab_size: int) -> Quantity:
    """What a quantity is read as where k ids of the teacher are known.

    A divergence becomes its TopK; one that is a TopK already stays what it is.

    Raises:
        ConfigError: It needs more of the teacher than that.
    """
    if not quantity.needs_teacher or isinstance(quantity, (CachedDivergence, CachedAgreement)):
        return quantity
    if isinstance(quantity, Agreement):
        return CachedAgreement()
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
            "say nothing of a tempered distribution; set its temperature to 1"
        )
    if isinstance(divergence, TopK):
        if divergence.side != "teacher":
            raise ConfigError("its TopK is over the student's likeliest ids, which are not known")
        wanted = min(divergence.k, vocab_size)
        if wanted > known:
            raise ConfigError(
                f"its TopK takes {wanted} ids, and {known} are known of this teacher: raise the k "
                "of --model.teacher_cache or --model.teacher_server, or lower the method's k"
            )
        divergence, known = divergence.divergence, wanted
    if divergence.softmax_temperature != 1.0:
        raise ConfigError(
            f"{type(divergence).__name__} changes the distributions that it compares, which needs "
            "all of the teacher's"
        )
    return CachedDivergence(divergence, known)
