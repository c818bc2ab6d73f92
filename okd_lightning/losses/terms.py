"""The contract between a method and the module: a term asks, the module measures, the term sums."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from okd_lightning.errors import ConfigError
from okd_lightning.losses.quantities import Quantity
from okd_lightning.records.batches import SOURCES, DistillBatch, LossOutput, Source
from okd_lightning.records.shapes import PositionMask, PositionValues


@dataclass(frozen=True)
class Measured:
    """What the module measured on one micro-batch, at its masked-in positions laid end to end.

    Attributes:
        values: [positions] a quantity that some term asked for.
        source: [positions] who wrote the row of each position (index into ``SOURCES``).
        row: [positions] which row of the batch each position belongs to.
        sampler_logprobs: [positions] the sampler's own log-prob (nats) of the drawn token.
        credits: [positions] a reward term: the credit of the row that each position belongs to.
    """

    values: Mapping[Quantity, PositionValues]
    source: Tensor
    row: Tensor
    sampler_logprobs: PositionValues
    credits: Mapping[str, PositionValues] = field(default_factory=dict)

    @classmethod
    def about(cls, batch: DistillBatch) -> Measured:
        """Whose the masked-in positions of a batch are; nothing is measured yet."""
        places = batch.student_reads.places
        rows = places.row
        return cls(
            values={},
            source=batch.source[rows],
            row=rows,
            sampler_logprobs=batch.sampler_logprobs[rows, places.column],
            credits={name: values[rows] for name, values in batch.credits.items()},
        )

    def __getitem__(self, quantity: Quantity) -> PositionValues:
        if quantity not in self.values:
            raise ConfigError(
                f"{quantity} was not measured; add it to the method's quantities (measured: "
                f"{', '.join(map(str, self.values)) or 'nothing'})"
            )
        return self.values[quantity]

    def part(self, positions: slice, values: Mapping[Quantity, PositionValues]) -> Measured:
        """Some of the positions, with what was measured there."""
        cut: dict[str, Any] = {
            name: value[positions]
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        cut["credits"] = {name: credit[positions] for name, credit in self.credits.items()}
        return replace(self, values=values, **cut)

    def mask(self, sources: Sequence[Source]) -> PositionMask:
        """[positions] True where the row was written by one of ``sources``."""
        codes = [SOURCES.index(source) for source in sources]
        mask = self.source == codes[0]
        for code in codes[1:]:
            mask = mask | (self.source == code)
        return mask


@runtime_checkable
class RowScorer(Protocol):
    """Gives every response that the student wrote a credit, such as a reward."""

    @property
    def reads_last_turn(self) -> bool:
        """Whether it reads the last turn of a response that called tools, or all of them.

        Turns are the student's own, with a line break between them.
        """

    def score(
        self, prompts: Sequence[str], responses: Sequence[str], references: Sequence[str]
    ) -> list[float]:
        """One raw score a response; NaN where there is none."""

    def credit_rows(self, scores: Sequence[float], groups: Sequence[Hashable]) -> list[float]:
        """One credit a response, from the scores of all responses to all prompts of a chunk."""


@runtime_checkable
class Term(Protocol):
    """One summand of a run's loss.

    Attributes:
        name: Logged as ``train/<name>``; unique in a run.
        weight: Factor on the term's mean.
        sources: The rows that it acts on; it is masked and counted there.
        on_policy_fraction: Share of optimizer steps whose responses the student writes, or None
            where the term takes what others ask for.
        quantities: What has to be measured for it.
        window: First optimizer step that it acts in, and the first one that it does not (None: it
            acts to the end).
        scorer: What gives its rows a credit when they have been written, or None.
        is_positionwise: Whether ``loss`` of some positions depends on these positions alone, so
            that the loss of a batch may be summed part by part. Where one term of a run says
            False, every term gets all positions of a batch at once, at the price of computing the
            heads twice.
        mixes_rows: Whether it wants both the student's rows and given ones in every optimizer step
            in which it acts.
        share_at: The share of ``on_policy_fraction`` in an optimizer step, where it changes while
            the run goes on; None where it does not.
        needs_teacher_prompt: Whether it has no meaning where both models read the same prompt.
    """

    name: str
    weight: float
    is_positionwise: bool
    mixes_rows: bool
    share_at: Callable[[int], float] | None
    needs_teacher_prompt: bool

    @property
    def window(self) -> tuple[int, int | None]:
        """The optimizer steps that it acts in."""

    @property
    def scorer(self) -> RowScorer | None:
        """What gives its rows a credit."""

    def weight_at(self, step: int) -> float:
        """The factor in optimizer step ``step``."""

    def wrap_writer(self, writer: Any) -> Any:
        """What writes the training's responses in the place of a ``rollouts.Writer``, or it."""

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


@dataclass(frozen=True)
class WeightedTerm:
    """A term and what its sum over a micro-batch is multiplied with.

    Attributes:
        term: The method's.
        factor: Its weight over the loss tokens of the optimizer step.
    """

    term: Term
    factor: float


@dataclass(frozen=True)
class WeightedLoss:
    """The loss of a micro-batch.

    Attributes:
        total: Scalar, the weighted sum over terms, with gradient.
        outputs: Each term's own sum, count and metrics, without gradient.
    """

    total: Tensor
    outputs: tuple[LossOutput, ...]


def weighted_loss(terms: Sequence[WeightedTerm], measured: Measured) -> WeightedLoss:
    """The weighted sum of every term's loss, with gradient to what was measured.

    Raises:
        ConfigError: A term returns something else than a LossOutput, or one without gradient.
    """
    outputs = [weighted.term.loss(measured) for weighted in terms]
    is_trained = any(values.requires_grad for values in measured.values.values())
    for weighted, output in zip(terms, outputs, strict=True):
        _check_output(weighted.term.name, output, is_trained)
    parts = [w.factor * o.sum for w, o in zip(terms, outputs, strict=True)]
    return WeightedLoss(torch.stack(parts).sum(), tuple(output.detached() for output in outputs))


def _check_output(name: str, output: object, is_trained: bool) -> None:
    if not isinstance(output, LossOutput):
        raise ConfigError(
            f"method {name}: loss returns {type(output).__name__}; expected a LossOutput, such as "
            "loss_output(values, measured.mask(self.sources))"
        )
    if is_trained and not output.sum.requires_grad:
        raise ConfigError(
            f"method {name}: its loss carries no gradient, so that it would train nothing; ask for "
            "a quantity that carries one (DrawnLogProb, ExactDivergence), and do not detach it"
        )


def check_positionwise(
    terms: Sequence[WeightedTerm], measured: Measured, outputs: Sequence[LossOutput]
) -> None:
    """Whether terms that say that they can be summed by parts sum to the same in two parts.

    Args:
        terms: All of them positionwise, as they say.
        measured: Some positions.
        outputs: What the terms say about these positions as a whole.

    Raises:
        ConfigError: One does not.
    """
    num = len(measured.row)
    halves = slice(0, num // 2), slice(num // 2, num)
    parts = [
        measured.part(half, {q: values[half] for q, values in measured.values.items()})
        for half in halves
    ]
    for weighted, whole in zip(terms, outputs, strict=True):
        if int(whole.count) != int(measured.mask(weighted.term.sources).sum()):
            continue  # what is wrong with it is its mask, which others see to
        first, second = (float(weighted.term.loss(part).sum.detach()) for part in parts)
        size = max(abs(first), abs(second), abs(float(whole.sum)))
        is_off = abs(first + second - float(whole.sum)) > 1e-3 * size + 1e-4 * num
        if math.isfinite(size) and is_off:
            name = weighted.term.name
            raise ConfigError(
                f"method {name}: its loss over {num} positions is {float(whole.sum):g}, and "
                f"{first + second:g} over two halves of them, so that it would depend on how "
                "batches are cut; a position's loss depends on others: say is_positionwise = False "
                "(on the Advantage, where it has one)"
            )
