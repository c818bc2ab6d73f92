"""Temperature for any divergence: its value between the tempered distributions of both sides."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from okd_lightning.divergences.base import Divergence
from okd_lightning.divergences.checking import as_divergence
from okd_lightning.divergences.log_arithmetic import widen
from okd_lightning.divergences.logprob_pair import LogProbPair, Summands
from okd_lightning.errors import ConfigError
from okd_lightning.records.shapes import (
    DrawnIds,
    LogProbs,
    LogRatio,
    OutcomeIds,
    PerId,
    PerToken,
    RatioValues,
)


def at_temperature(divergence: Divergence, temperature: float) -> Divergence:
    """Return a method's divergence at the method's temperature.

    Raises:
        ConfigError: The divergence has a temperature too, and both would apply.
    """
    if temperature == 1:
        return divergence
    if isinstance(divergence, Tempered):
        raise ConfigError(
            f"temperature {temperature} is given together with {divergence}, and both would act; "
            "give one of them"
        )
    return Tempered(divergence, temperature)


@dataclass(frozen=True)
class Tempered(Divergence):
    """tau^2 D(p^tau, q^tau), with p^tau = softmax(z / tau) of the logits z, and likewise q^tau.

    The factor tau^2 is part of the divergence: it scales loss and gradient alike and keeps the
    gradient's size as tau grows (arXiv 1503.02531, section 2). ``value`` takes log-probabilities
    at temperature 1 (logits up to a constant) and tempers both sides itself.

    p^tau(a) depends on the whole vocabulary, not on u alone. The functions of u (``generator``,
    ``weight``, ``terms`` and the limits) are therefore those of the inner divergence times tau^2,
    **to be evaluated at the log-ratio of the tempered distributions**, for tokens sampled from
    p^tau. Do not pass them a log-ratio at temperature 1.

    Args:
        divergence: Divergence between the tempered distributions.
        temperature: tau > 0; above 1 it flattens both sides.

    Raises:
        ConfigError: ``temperature`` is not a positive finite number.
    """

    divergence: Divergence
    temperature: float

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "divergence", as_divergence(self.divergence, "divergence of Tempered")
        )
        if not 0.0 < self.temperature < math.inf:
            raise ConfigError(
                f"Tempered: temperature is {self.temperature!r}, expected a positive finite number"
            )
        object.__setattr__(self, "merges_ids", self.divergence.merges_ids)

    def generator(self, log_ratio: LogRatio) -> RatioValues:
        """tau^2 f(u) of the tempered distributions' log-ratio."""
        return self._scale * self.divergence.generator(log_ratio)

    def weight(self, log_ratio: LogRatio) -> RatioValues:
        """tau^2 w_f(u) of the tempered distributions' log-ratio."""
        return self._scale * self.divergence.weight(log_ratio)

    def terms(
        self, student_logprobs: LogProbs, teacher_logprobs: LogProbs, log_ratio: PerId
    ) -> PerId:
        """tau^2 p^tau f(u) of log-probabilities that are tempered already."""
        inner = self.divergence.terms(student_logprobs, teacher_logprobs, log_ratio)
        return self._scale * inner

    def summands(self, pair: LogProbPair) -> Summands:
        """tau^2 times the inner divergence's, of log-probabilities that are tempered already."""
        scale, inner = self._scale, self.divergence.summands(pair)
        return Summands(inner.terms * scale, inner.weights * scale)

    def outcome_ids(
        self, student_logprobs: LogProbs, teacher_logprobs: LogProbs
    ) -> OutcomeIds | None:
        """Return the inner divergence's, of log-probabilities that are tempered already."""
        return self.divergence.outcome_ids(student_logprobs, teacher_logprobs)

    @property
    def softmax_temperature(self) -> float | None:
        """Product of tau and the inner divergence's temperature; None if that is None."""
        inner = self.divergence.softmax_temperature
        return None if inner is None else self.temperature * inner

    @property
    def limit_at_zero(self) -> float:
        """tau^2 times the inner divergence's."""
        return self._scale * self.divergence.limit_at_zero

    @property
    def limit_at_infinity(self) -> float:
        """tau^2 times the inner divergence's."""
        return self._scale * self.divergence.limit_at_infinity

    @property
    def is_symmetric(self) -> bool:
        """True if the inner divergence is: both sides are tempered alike."""
        return self.divergence.is_symmetric

    def value(self, student_logprobs: LogProbs, teacher_logprobs: LogProbs) -> PerToken:
        """tau^2 D(p^tau, q^tau) at every position.

        Args:
            student_logprobs: [*lead, vocab] log p (nats) at temperature 1.
            teacher_logprobs: [*lead, vocab] log q (nats) at temperature 1.

        Returns:
            [*lead] nats per position. Gradient flows to both sides.
        """
        tempered = self._temper(student_logprobs, teacher_logprobs)
        return self._scale * self.divergence.value(*tempered)

    def drawn(
        self, student_logprobs: LogProbs, teacher_logprobs: LogProbs, ids: DrawnIds
    ) -> tuple[PerToken, PerToken]:
        """[*lead] tempered log p^tau and log q^tau of the sampled tokens."""
        return self.divergence.drawn(*self._temper(student_logprobs, teacher_logprobs), ids)

    @torch.no_grad()
    def expected_weight(
        self,
        student_logprobs: LogProbs,
        teacher_logprobs: LogProbs,
        max_log_ratio: float = math.inf,
    ) -> PerToken:
        """[*lead] tau^2 E[w_f(u)] under p^tau."""
        tempered = self._temper(student_logprobs, teacher_logprobs)
        return self._scale * self.divergence.expected_weight(*tempered, max_log_ratio)

    def _temper(
        self, student_logprobs: LogProbs, teacher_logprobs: LogProbs
    ) -> tuple[LogProbs, LogProbs]:
        student_logprobs, teacher_logprobs = widen(student_logprobs, teacher_logprobs)
        return (
            torch.log_softmax(student_logprobs / self.temperature, dim=-1),
            torch.log_softmax(teacher_logprobs / self.temperature, dim=-1),
        )

    @property
    def _scale(self) -> float:
        """tau^2."""
        return self.temperature**2
