"""The contract between a method and the module: a term asks, the module measures, the term sums."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from okd_lightning.losses.quantities import Quantity
from okd_lightning.records import SOURCES, LossOutput, Source
from okd_lightning.shapes import PositionMask, PositionValues


@dataclass(frozen=True)
class Measured:
    """What the module measured on one micro-batch, at its masked-in positions laid end to end.

    Attributes:
        values: [positions] a quantity that some term asked for.
        source: [positions] who wrote the row of each position (index into ``SOURCES``).
        row: [positions] which row of the batch each position belongs to.
        sampler_logprobs: [positions] the sampler's own log-prob (nats) of the drawn token.
    """

    values: Mapping[Quantity, PositionValues]
    source: Tensor
    row: Tensor
    sampler_logprobs: PositionValues

    def __getitem__(self, quantity: Quantity) -> PositionValues:
        return self.values[quantity]

    def mask(self, sources: Sequence[Source]) -> PositionMask:
        """[positions] True where the row was written by one of ``sources``."""
        codes = [SOURCES.index(source) for source in sources]
        mask = self.source == codes[0]
        for code in codes[1:]:
            mask = mask | (self.source == code)
        return mask


class Term(Protocol):
    """One summand of a run's loss.

    Attributes:
        name: Logged as ``train/<name>``; unique in a run.
        weight: Factor on the term's mean.
        sources: The rows that it acts on; it is masked and counted there.
        on_policy_fraction: Share of optimizer steps whose responses the student writes, or None
            where the term takes what others ask for.
        quantities: What has to be measured for it.
        needs_teacher_prompt: Whether it has no meaning where both models read the same prompt.
    """

    name: str
    weight: float
    needs_teacher_prompt: bool

    @property
    def sources(self) -> tuple[Source, ...]:
        """The rows that it acts on."""

    @property
    def on_policy_fraction(self) -> float | None:
        """Share of optimizer steps that are the student's own generations."""

    @property
    def quantities(self) -> tuple[Quantity, ...]:
        """What has to be measured for it."""

    def loss(self, measured: Measured) -> LossOutput:
        """Sum over the positions of ``sources``."""
