"""The interface between method and module: a term lists quantities, the module measures them, the
term sums them.

A method builds its terms once per run (``DistillationCallback.terms``). Another form of a term (in
a stage, with a cached teacher) is ``dataclasses.replace`` of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from okd_lightning.errors import ConfigError
from okd_lightning.losses.quantities import Quantity
from okd_lightning.records.batches import SOURCES, DistillBatch, LossOutput, Source
from okd_lightning.records.requests import Chat
from okd_lightning.records.shapes import PositionMask, PositionValues


@dataclass(frozen=True)
class Measured:
    """Measured quantities of one micro-batch at its loss positions, flattened.

    Attributes:
        values: [positions] for each quantity that a term needs.
        source: [positions] generator of each position's row (index into ``SOURCES``).
        row: [positions] each position's row in the batch.
        sampler_logprobs: [positions] the sampler's log-probability (nats) of the sampled token.
        credits: [positions] for each reward term: the advantage of each position's row.
        merges_ends: [positions] True where the sampler's log-probability of an end is that of all
            end ids together; None for nowhere.
        teacher: [positions] number of each position's teacher; None where there is one for all.
        num_teachers: Teachers of which each term's sum is logged; 0 where there is one for all.
        has_chunks: Whether the positions are chunks of text, for a teacher with another tokenizer.
    """

    values: Mapping[Quantity, PositionValues]
    source: Tensor
    row: Tensor
    sampler_logprobs: PositionValues
    credits: Mapping[str, PositionValues] = field(default_factory=dict)
    merges_ends: PositionMask | None = None
    teacher: Tensor | None = None
    num_teachers: int = 0
    has_chunks: bool = False

    @classmethod
    def about(cls, batch: DistillBatch) -> Measured:
        """Return the source, row and sampler of a batch's loss positions, without values."""
        places = batch.student_reads.places
        rows = places.row
        return cls(
            values={},
            source=batch.source[rows],
            row=rows,
            sampler_logprobs=batch.sampler_logprobs[rows, places.column],
            credits={name: values[rows] for name, values in batch.credits.items()},
            merges_ends=None if batch.merges_ends is None else batch.merges_ends[rows],
            teacher=None if batch.teacher is None else batch.teacher[rows],
            num_teachers=0 if batch.teacher is None else len(batch.teacher_counts),
        )

    def __getitem__(self, quantity: Quantity) -> PositionValues:
        if quantity not in self.values:
            raise ConfigError(
                f"{quantity} was not measured; add it to the method's quantities (measured: "
                f"{', '.join(map(str, self.values)) or 'nothing'})"
            )
        return self.values[quantity]

    def part(self, positions: slice, values: Mapping[Quantity, PositionValues]) -> Measured:
        """Return some of the positions, with their values."""
        cut: dict[str, Any] = {
            name: value[positions]
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        cut["credits"] = {name: credit[positions] for name, credit in self.credits.items()}
        return replace(self, values=values, **cut)

    def of_teacher(self, number: int) -> Measured:
        """Return these positions, with no source at those of other teachers."""
        assert self.teacher is not None
        return replace(self, source=self.source.where(self.teacher == number, -1))

    def mask(self, sources: Sequence[Source]) -> PositionMask:
        """Return [positions], True where the row comes from one of ``sources``."""
        codes = [SOURCES.index(source) for source in sources]
        mask = self.source == codes[0]
        for code in codes[1:]:
            mask = mask | (self.source == code)
        return mask


@runtime_checkable
class RowScorer(Protocol):
    """Scorer of the student's responses that gives each an advantage, such as a reward."""

    @property
    def reads_last_turn(self) -> bool:
        """True: read the last turn of a response that called tools; False: read all turns.

        Turns are the student's own, with a line break between them.
        """

    def score(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        references: Sequence[str],
        chats: Sequence[Chat | None] = (),
    ) -> list[float]:
        """Return one raw score per response; NaN where there is none."""

    def new_scores(self) -> Mapping[str, float]:
        """Return this rank's scores since the last call that all ranks remember, by key."""

    def remember(self, scores: Mapping[str, float]) -> None:
        """Take the new scores of all ranks."""

    def credit_rows(self, scores: Sequence[float], groups: Sequence[Hashable]) -> list[float]:
        """Return one advantage per response, from the scores of a whole rollout batch."""


def _unchanged(engine: Any) -> Any:
    return engine


@dataclass(frozen=True)
class Constant:
    """Weight of every optimizer step; a ``Stage`` gives another one by step."""

    value: float

    def __call__(self, step: int) -> float:
        """Return the weight."""
        del step
        return self.value


@dataclass(frozen=True, eq=False)
class Term:
    """One summand of a run's loss.

    Attributes:
        name: Logged as ``train/<name>``; unique in a run.
        sources: Sources of the rows that it applies to; only these are masked in and counted.
        quantities: Quantities that must be measured.
        loss: Returns the sum over the measured positions of ``sources``.
        weight: Factor on the term's mean, by optimizer step.
        window: First optimizer step that it acts in, and first step after it (None: no end).
        on_policy_fraction: Share of optimizer steps with on-policy samples, or None to use the
            rows that other terms need.
        share_at: ``on_policy_fraction`` by optimizer step, if it changes during the run; else
            None.
        mixes_rows: True if it needs both on-policy and dataset rows in every optimizer step in
            which it acts.
        is_positionwise: True if ``loss`` of some positions depends on these positions alone, so
            that the loss of a batch may be summed in parts. If one term of a run is False, every
            term gets all positions of a batch at once, and the heads are computed twice.
        scorer: Scorer that gives its rows an advantage after generation, or None.
        discount: Weight of a later token's reward in an earlier one's advantage, where the term has
            later rewards; 0 elsewhere.
        needs_teacher_prompt: True if it needs a teacher prompt that differs from the student's.
        wrap_engine: Function that wraps the ``RolloutEngine`` of training.
        kind: Kind of its method in checkpoints: a run resumes with the same kinds.
        settings: The method's class and arguments, for loggers.
    """

    name: str
    sources: tuple[Source, ...]
    quantities: tuple[Quantity, ...]
    loss: Callable[[Measured], LossOutput]
    weight: Callable[[int], float]
    window: tuple[int, int | None] = (0, None)
    on_policy_fraction: float | None = None
    share_at: Callable[[int], float] | None = None
    mixes_rows: bool = False
    is_positionwise: bool = True
    scorer: RowScorer | None = None
    discount: float = 0.0
    needs_teacher_prompt: bool = False
    wrap_engine: Callable[[Any], Any] = _unchanged
    kind: str = "Term"
    settings: Mapping[str, Any] = field(default_factory=dict)

    def acts_in(self, step: int) -> bool:
        """Return whether it acts in optimizer step ``step``."""
        start, end = self.window
        return start <= step and (end is None or step < end)

    @cached_property
    def source_codes(self) -> tuple[int, ...]:
        """``sources`` as indices into ``SOURCES``."""
        return tuple(SOURCES.index(source) for source in self.sources)

    @cached_property
    def reads_states(self) -> bool:
        """True if it is measured from hidden states or routers, and not from logits."""
        return any(quantity.reads_states for quantity in self.quantities)

    @property
    def follows_others(self) -> bool:
        """True if it acts on the rows of any source that the run's other terms need."""
        return self.on_policy_fraction is None and set(self.sources) == set(SOURCES)

    @property
    def asks_teacher(self) -> bool:
        """True if it acts on the teacher's responses, which are then generated for it."""
        return "teacher" in self.sources and not self.follows_others

    @cached_property
    def trains_teacher(self) -> bool:
        """True if it trains the teacher's online module while it acts."""
        return any(quantity.trains_teacher for quantity in self.quantities)


@dataclass(frozen=True)
class WeightedTerm:
    """A term and the factor on its sum over a micro-batch.

    Attributes:
        term: The method's term.
        factor: Its weight times ``reduction.step_factor``.
        weight: Its weight in the optimizer step, for logs.
    """

    term: Term
    factor: float
    weight: float = 1.0


@dataclass(frozen=True)
class WeightedLoss:
    """The loss of a micro-batch.

    Attributes:
        total: Scalar, the weighted sum over terms, with gradient.
        outputs: Each term's sum, count and metrics, without gradient.
    """

    total: Tensor
    outputs: tuple[LossOutput, ...]


def weighted_loss(terms: Sequence[WeightedTerm], measured: Measured) -> WeightedLoss:
    """Return the weighted sum of the terms' losses, with gradient to the measured values.

    Raises:
        ConfigError: A term returns no LossOutput, or one without gradient.
    """
    is_trained = any(values.requires_grad for values in measured.values.values())
    outputs = [_checked_loss(weighted.term, measured, is_trained) for weighted in terms]
    parts = [w.factor * o.sum for w, o in zip(terms, outputs, strict=True)]
    return WeightedLoss(torch.stack(parts).sum(), tuple(output.detached() for output in outputs))


def _checked_loss(term: Term, measured: Measured, is_trained: bool) -> LossOutput:
    """Return the term's loss, with its part of each teacher where there are several."""
    output = term.loss(measured)
    _check_output(term.name, output, is_trained)
    if not measured.num_teachers:
        return output
    with torch.no_grad():
        parts = [term.loss(measured.of_teacher(i)).sum for i in range(measured.num_teachers)]
    return replace(output, by_teacher=torch.stack(parts))


def _check_output(name: str, output: object, is_trained: bool) -> None:
    if not isinstance(output, LossOutput):
        raise ConfigError(
            f"method {name}: loss returns {type(output).__name__}; expected a LossOutput, such as "
            "loss_output(values, measured.mask(self.sources))"
        )
    if is_trained and not output.sum.requires_grad:
        raise ConfigError(
            f"method {name}: its loss carries no gradient, so that it would train nothing; use a "
            "quantity that carries one (DrawnLogProb, ExactDivergence), and do not detach it"
        )


def check_positionwise(
    terms: Sequence[WeightedTerm], measured: Measured, outputs: Sequence[LossOutput]
) -> None:
    """Check that terms that declare themselves positionwise give the same sum in two parts.

    Args:
        terms: Terms that declare themselves positionwise.
        measured: Some positions.
        outputs: The terms' outputs for all these positions.

    Raises:
        ConfigError: A term's parts do not add up to its whole.
    """
    num = len(measured.row)
    halves = slice(0, num // 2), slice(num // 2, num)
    parts = [
        measured.part(half, {q: values[half] for q, values in measured.values.items()})
        for half in halves
    ]
    for weighted, whole in zip(terms, outputs, strict=True):
        if int(whole.count) != int(measured.mask(weighted.term.sources).sum()):
            continue  # its mask is wrong, which is checked elsewhere
        first, second = (float(weighted.term.loss(part).sum.detach()) for part in parts)
        size = max(abs(first), abs(second), abs(float(whole.sum)))
        is_off = abs(first + second - float(whole.sum)) > 1e-3 * size + 1e-4 * num
        if math.isfinite(size) and is_off:
            name = weighted.term.name
            raise ConfigError(
                f"method {name}: its loss over {num} positions is {float(whole.sum):g}, and "
                f"{first + second:g} over two halves of them, so that it would depend on the "
                "division of batches; a position's loss depends on others: set is_positionwise = "
                "False "
                "(on the Advantage, where it has one)"
            )
