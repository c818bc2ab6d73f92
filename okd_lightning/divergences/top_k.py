"""Top-k with a tail: any divergence between coarser distributions, a lower bound of the exact one.

Both sides are reduced, at every position, to k ids and one outcome for all others. The result is
a distribution again, so every f gives a divergence that is never negative and never above the
exact one (merging outcomes loses information). Renormalising over the k ids, or leaving out the
tail, guarantees neither.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from okd_lightning.divergences.base import Divergence
from okd_lightning.divergences.checking import as_divergence
from okd_lightning.divergences.log_arithmetic import widen
from okd_lightning.divergences.logprob_pair import LogProbPair, Summands
from okd_lightning.divergences.tempered import Tempered
from okd_lightning.errors import ConfigError
from okd_lightning.records.shapes import (
    DrawnIds,
    LogProbs,
    LogRatio,
    OutcomeIds,
    OutcomeLogProbs,
    PerId,
    PerToken,
    RatioValues,
)


@dataclass(frozen=True)
class TopK(Divergence):
    """D over the k most likely ids of one side and one outcome (the tail) for all others.

    Equal to the exact divergence at k = vocabulary, at most equal below (data processing).
    Gradient flows to both sides, also through the tail; the choice of ids is a constant.

    Args:
        divergence: Divergence between the coarser distributions.
        k: Ids that keep their own probability, at least 1.
        side: Side that chooses the ids: teacher (as a served or cached teacher returns them) or
            student.

    Raises:
        ConfigError: k below 1, an unknown side, or a tempered ``divergence``: temper before top-k,
            with Tempered(TopK(...), temperature).
    """

    divergence: Divergence
    k: int
    side: str = "teacher"

    def __post_init__(self) -> None:
        object.__setattr__(self, "divergence", as_divergence(self.divergence, "divergence of TopK"))
        if self.k < 1:
            raise ConfigError(f"TopK: k is {self.k}, expected at least 1")
        if self.side not in ("teacher", "student"):
            raise ConfigError(f"TopK: side is {self.side!r}, expected 'teacher' or 'student'")
        if isinstance(self.divergence, Tempered):
            raise ConfigError(
                "TopK of a tempered divergence would temper k probabilities and a tail, which "
                "differs from tempering the whole distribution; temper first: Tempered(TopK(...), "
                "temperature)"
            )

    def generator(self, log_ratio: LogRatio) -> RatioValues:
        """The inner f, at the log-ratio of an outcome."""
        return self.divergence.generator(log_ratio)

    def weight(self, log_ratio: LogRatio) -> RatioValues:
        """The inner w_f, at the log-ratio of an outcome."""
        return self.divergence.weight(log_ratio)

    def terms(
        self, student_logprobs: LogProbs, teacher_logprobs: LogProbs, log_ratio: PerId
    ) -> PerId:
        """The inner p f(u), of outcomes."""
        return self.divergence.terms(student_logprobs, teacher_logprobs, log_ratio)

    def summands(self, pair: LogProbPair) -> Summands:
        """Return the inner divergence's summands, of outcomes."""
        return self.divergence.summands(pair)

    def outcome_ids(
        self, student_logprobs: LogProbs, teacher_logprobs: LogProbs
    ) -> OutcomeIds | None:
        """[*lead, k] the k ids; None if k covers the vocabulary."""
        return self._chosen(student_logprobs, teacher_logprobs)

    @property
    def softmax_temperature(self) -> float | None:
        """1; None if the inner divergence changes the distributions as well."""
        is_plain = self.divergence.softmax_temperature == 1.0
        return 1.0 if is_plain and not isinstance(self.divergence, TopK) else None

    @property
    def limit_at_zero(self) -> float:
        """Limit of the inner divergence."""
        return self.divergence.limit_at_zero

    @property
    def limit_at_infinity(self) -> float:
        """Limit of the inner divergence."""
        return self.divergence.limit_at_infinity

    def value(self, student_logprobs: LogProbs, teacher_logprobs: LogProbs) -> PerToken:
        """Return the divergence between the k + 1 outcomes at every position.

        Args:
            student_logprobs: [*lead, vocab] log p (nats).
            teacher_logprobs: [*lead, vocab] log q (nats).

        Returns:
            [*lead] nats per position. Gradient flows to both sides.
        """
        return self.divergence.value(*self._outcomes(student_logprobs, teacher_logprobs))

    def drawn(
        self, student_logprobs: LogProbs, teacher_logprobs: LogProbs, ids: DrawnIds
    ) -> tuple[PerToken, PerToken]:
        """[*lead] log p and log q (nats) of each sampled token's outcome."""
        chosen = self._chosen(student_logprobs, teacher_logprobs)
        if chosen is None:
            return super().drawn(student_logprobs, teacher_logprobs, ids)
        own = super().drawn(student_logprobs, teacher_logprobs, ids)
        is_chosen = (chosen == ids[..., None]).any(-1)
        tails = (_tail(side, chosen)[..., 0] for side in (student_logprobs, teacher_logprobs))
        student, teacher = (
            torch.where(is_chosen, single, tail) for single, tail in zip(own, tails, strict=True)
        )
        return student, teacher

    @torch.no_grad()
    def expected_weight(
        self,
        student_logprobs: LogProbs,
        teacher_logprobs: LogProbs,
        max_log_ratio: float = math.inf,
    ) -> PerToken:
        """[*lead] E_p[w_f(u)] over the outcomes, without gradient."""
        outcomes = self._outcomes(student_logprobs, teacher_logprobs)
        return self.divergence.expected_weight(*outcomes, max_log_ratio)

    def _outcomes(
        self, student_logprobs: LogProbs, teacher_logprobs: LogProbs
    ) -> tuple[OutcomeLogProbs, OutcomeLogProbs]:
        """[*lead, k + 1] log-probabilities of the k ids and the tail, of both sides."""
        student_logprobs, teacher_logprobs = widen(student_logprobs, teacher_logprobs)
        chosen = self._chosen(student_logprobs, teacher_logprobs)
        if chosen is None:
            return student_logprobs, teacher_logprobs
        return merged(student_logprobs, chosen), merged(teacher_logprobs, chosen)

    def _chosen(self, student_logprobs: LogProbs, teacher_logprobs: LogProbs) -> OutcomeIds | None:
        """[*lead, k] the k ids; None if k covers the vocabulary."""
        side = teacher_logprobs if self.side == "teacher" else student_logprobs
        return side.detach().topk(self.k, dim=-1).indices if self.k < side.shape[-1] else None


def merged(logprobs: LogProbs, ids: OutcomeIds) -> OutcomeLogProbs:
    """[*lead, k + 1] log-probability (nats) of k ids and of all others together."""
    return torch.cat([logprobs.gather(-1, ids), _tail(logprobs, ids)], -1)


def _tail(logprobs: Tensor, chosen: OutcomeIds) -> Tensor:
    """[*lead, 1] log-probability of all ids that were not chosen; -inf if it is 0."""
    rest = logprobs.scatter(-1, chosen, -math.inf)
    is_empty = (rest == -math.inf).all(-1, keepdim=True)
    finite = rest.masked_fill(is_empty, 0.0)  # the gradient of logsumexp over only -inf is NaN
    return finite.logsumexp(-1, keepdim=True).masked_fill(is_empty, -math.inf)
