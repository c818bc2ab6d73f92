"""Losses of a pair with two tokenizers, chunk by chunk (``records.chunks``).

A chunk c is one action of both models: L = Σ log-probability of its tokens, student's or teacher's,
with all ends of a response as one outcome. Methods measure chunks here instead of positions:

* a divergence is that between the two outcomes {c, not c} with p = exp(L_S), q = exp(L_T), for any
  f (ALM, arXiv 2503.20083, has its cross-entropy): at most the divergence over all chunks;
* a sampled token is the chunk: u = exp(L_T - L_S), and each of its student tokens has its
  advantage, because ∇L_S is the sum of their gradients. The importance ratio is the chunk's too;
* the value baseline E_p[w_f] needs all chunks that could have been sampled, so it is
  replaced by w_f(1), which gives the centred advantage.

Both are approximations, because they use a single segmentation of the text: the teacher also gives
it probability through other segmentations with longer tokens (docs/concepts/another-tokenizer.md
measures the bias). A term's sum over chunks is divided like any other, by tokens of the student.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from okd_lightning.divergences import Divergence, Tempered, TopK
from okd_lightning.errors import ConfigError
from okd_lightning.losses.closed_form import target_logprob
from okd_lightning.losses.exact import measure
from okd_lightning.losses.outcomes import PackedHead, unpack_drawn
from okd_lightning.losses.projection import Side
from okd_lightning.losses.quantities import (
    DrawnLogProb,
    DrawnOutcome,
    ExactDivergence,
    ExpectedWeight,
    Quantity,
    TeacherShift,
    Tile,
)
from okd_lightning.losses.shared_tokens import NextTokens, compare_next_tokens
from okd_lightning.losses.terms import Measured, Term, WeightedLoss, WeightedTerm, weighted_loss
from okd_lightning.losses.text_law import TextLaw, cover_masses
from okd_lightning.records.batches import SOURCES, DistillBatch, LossOutput
from okd_lightning.records.chunks import Chunks, PointIndex
from okd_lightning.records.shapes import PositionValues

Reader: TypeAlias = Literal["student", "teacher", "base"]
"""Model that reads one of the two texts; the base reads the teacher's."""


@dataclass(frozen=True)
class OutcomeLogProb(Quantity):
    """Log-probability (nats) of the target's outcome, all ends being one, with gradient.

    Args:
        temperature: τ of the distribution.
    """

    temperature: float = 1.0
    needs_teacher = False

    def measure(self, tile: Tile) -> PositionValues:
        """[positions] nats, at most 0."""
        logits = tile.logits("student")
        if self.temperature == 1.0:
            return target_logprob(logits, tile.student_logprobs, tile.targets)
        tempered = logits / self.temperature
        return target_logprob(tempered, tempered.log_softmax(-1), tile.targets)


TokenValue: TypeAlias = tuple[Reader, Quantity]
"""A quantity at the tokens that one model reads, which takes the quantity's student role."""

_OWN = DrawnLogProb()
"""Log-probability of the target's id."""


def token_values(quantity: Quantity) -> tuple[TokenValue, ...]:
    """Return what must be measured at tokens for a quantity at chunks.

    Raises:
        ConfigError: The quantity has no meaning for two tokenizers.
    """
    match quantity:
        case ExactDivergence():
            of_token = OutcomeLogProb(_temperature(quantity.divergence))
            return ("student", of_token), ("teacher", of_token)
        case TeacherShift():
            of_token = OutcomeLogProb(_temperature(quantity.divergence))
            return ("teacher", of_token), ("base", of_token)
        case DrawnLogProb():
            return ((quantity.role, _OWN),)
        case DrawnOutcome():
            _temperature(quantity.divergence)
            return ((quantity.role, OutcomeLogProb()),)
        case ExpectedWeight():
            _temperature(quantity.divergence)
            return ()
    raise ConfigError(
        f"it asks for {type(quantity).__name__}, which compares single tokens, and the teacher has "
        "another tokenizer"
    )


def _temperature(divergence: Divergence) -> float:
    found = divergence.softmax_temperature
    inner, _ = _untempered(divergence)
    if found is None or isinstance(inner, TopK):
        raise ConfigError(
            f"{type(inner).__name__} is over single tokens, and the teacher has another tokenizer, "
            "with which only whole chunks are compared: give its inner divergence"
        )
    return found


def _untempered(divergence: Divergence) -> tuple[Divergence, float]:
    """Return the divergence between tempered distributions, and its factor τ²."""
    factor = 1.0
    while isinstance(divergence, Tempered):
        factor *= divergence.temperature**2
        divergence = divergence.divergence
    return divergence, factor


def two_cells(logprobs: Tensor) -> Tensor:
    """[chunks] L → [chunks, 2] log-probabilities (nats) of the chunk and of everything else.

    In float64, where the second cell of L near 0 keeps its digits. L is bounded above by minus the
    input's rounding error, the precision to which 1 - exp(L) is known.
    """
    least = torch.finfo(logprobs.dtype).eps
    wide = logprobs.double()
    wide = torch.where(wide < -least, wide, wide - wide.detach() - least)
    is_likely = wide > -0.6931471805599453
    # each branch's unused inputs are replaced, or their infinite gradients would give NaN
    near = (-wide.where(is_likely, -1.0).expm1()).log()
    far = (-wide.where(~is_likely, -1.0).exp()).log1p()
    return torch.stack([wide, torch.where(is_likely, near, far)], dim=-1)


@dataclass(frozen=True)
class ChunkValues:
    """Sums over the chunks of a micro-batch.

    Attributes:
        chunks: The chunks.
        tokens: Values of both texts' tokens, [positions] or [teacher positions].
        quantities: The requested quantities.
        laws: Distributions over texts, by reader and temperature; none for losses between chunks.
        next_tokens: Distributions of the next token, by reader and temperature; none for other
            losses.
        teacher_scale: Factor on the teacher's cross-entropy, which is a mean over its own tokens:
            tokens of the student in the step over those of the teacher.
    """

    chunks: Chunks
    tokens: Mapping[TokenValue, Tensor]
    quantities: tuple[Quantity, ...] = ()
    laws: Mapping[tuple[Reader, float], TextLaw] = field(default_factory=dict)
    next_tokens: Mapping[tuple[Reader, float], NextTokens] = field(default_factory=dict)
    teacher_scale: float = 1.0

    def of(self, quantity: Quantity) -> Tensor:
        """[chunks] value of a quantity (nats), with gradient to its learner."""
        match quantity:
            case ExactDivergence():
                is_student = quantity.learner == "student"
                return self._between(quantity, (is_student, not is_student))
            case TeacherShift():
                return self._between(quantity, (quantity.learns, False))
            case ExpectedWeight():
                value = quantity.divergence.weight_at_one
                student = next(v for (reader, _), v in self.tokens.items() if reader == "student")
                return student.new_full((self.chunks.num,), value)
            case DrawnOutcome():
                return self._sum(token_values(quantity)[0]).detach()
        (of_tokens,) = token_values(quantity)
        scale = self.teacher_scale if of_tokens[0] == "teacher" else 1.0
        return self._sum(of_tokens) * scale

    def _between(
        self, quantity: ExactDivergence | TeacherShift, learns: tuple[bool, bool]
    ) -> Tensor:
        """[chunks] divergence of two models, with gradient to those that learn."""
        compare = partial(_between, quantity.divergence)
        keys = token_values(quantity)
        if self.chunks.shared is not None:
            one, other = (self.next_tokens[_law_of(key)] for key in keys)
            return compare_next_tokens(one, other, compare, learns)
        cells = [self._cells(key) for key in keys]
        return compare(*(c if own else c.detach() for c, own in zip(cells, learns, strict=True)))

    def _cells(self, key: TokenValue) -> Tensor:
        """[chunks, outcomes] log-probabilities (nats) of the outcomes compared at each chunk."""
        points = self.chunks.points
        if points is None:
            return two_cells(self._sum(key))
        law = self.laws[_law_of(key)]
        if law.covers.bounds.shape[1] == 2:
            return two_cells(law.chunk_logprobs(points.start, points.end, self._sum(key)))
        return law.next_bytes(points.start, points.vocabularies.alphabet)

    def _sum(self, key: TokenValue) -> Tensor:
        is_own = key[0] == "student"
        index = self.chunks.student if is_own else self.chunks.teacher
        return self.chunks.sums(self.tokens[key], index)

    def at_positions(self) -> dict[Quantity, Tensor]:
        """[positions] values of all quantities, those of chunks at their first student token."""
        of_student = {q: v for (reader, q), v in self.tokens.items() if reader == "student"}
        return {q: self._spread(q) if q.needs_teacher else of_student[q] for q in self.quantities}

    def _spread(self, quantity: Quantity) -> Tensor:
        values = self.of(quantity)
        return values.new_zeros(len(self.chunks.student)).index_put((self.chunks.first,), values)


def _law_of(key: TokenValue) -> tuple[Reader, float]:
    reader, quantity = key
    assert isinstance(quantity, OutcomeLogProb)
    return reader, quantity.temperature


def _between(divergence: Divergence, student: Tensor, teacher: Tensor) -> Tensor:
    inner, factor = _untempered(divergence)
    return factor * inner.value(student, teacher)


def measure_chunks(
    batch: DistillBatch,
    quantities: Sequence[Quantity],
    sides: tuple[Side, Side | None, Side | None],
    tile_positions: int | None = None,
) -> ChunkValues:
    """Measure the tokens of both texts, once each, for quantities at chunks.

    Args:
        batch: Rows with chunks.
        quantities: Quantities; those without a teacher are measured at tokens.
        sides: The student's, the teacher's and its base's, each at its own loss positions.
        tile_positions: Positions per tile; None chooses from the vocabulary.

    Returns:
        The tokens' values. Gradient flows to the models that the quantities train.
    """
    asked: dict[Reader, dict[Quantity, None]] = {"student": {}, "teacher": {}, "base": {}}
    for quantity in quantities:
        found = token_values(quantity) if quantity.needs_teacher else (("student", quantity),)
        for reader, of_token in found:
            asked[reader][of_token] = None
    chunks = batch.chunks
    assert chunks is not None
    about = Measured.about(batch)
    reads = {"student": batch.student_reads, "teacher": batch.teacher_reads}
    tokens: dict[TokenValue, Tensor] = {}
    laws: dict[tuple[Reader, float], TextLaw] = {}
    next_tokens: dict[tuple[Reader, float], NextTokens] = {}
    for (reader, wanted), side in zip(asked.items(), sides, strict=True):
        if side is None or not wanted:
            continue
        is_own = reader == "student"
        if isinstance(side.head, PackedHead):  # of a served teacher the target's outcome is known
            drawn = unpack_drawn(side.hidden)
            tokens.update({(reader, quantity): drawn for quantity in wanted})
            continue
        values = measure(
            wanted,
            side,
            None,
            reads["student" if is_own else "teacher"].targets,
            side.width,
            tile_positions,
            merges_ends=about.merges_ends if is_own else None,
        )
        tokens.update({(reader, quantity): found for quantity, found in values.items()})
        laws.update(_laws(chunks.points, reader, side, values, tile_positions))
        next_tokens.update(_next_tokens(chunks, reader, side, values))
    scale = _teacher_scale(batch)
    return ChunkValues(chunks, tokens, tuple(quantities), laws, next_tokens, scale)


def _laws(
    points: PointIndex | None,
    reader: Reader,
    side: Side,
    values: Mapping[Quantity, Tensor],
    tile_positions: int | None,
) -> dict[tuple[Reader, float], TextLaw]:
    """Return one model's distributions over texts, at the temperatures of its tokens' measures."""
    if points is None:
        return {}
    is_own = reader == "student"
    covers = points.student if is_own else points.teacher
    order = points.vocabularies.student if is_own else points.vocabularies.teacher
    found = {}
    for quantity, logprobs in values.items():
        if isinstance(quantity, OutcomeLogProb):
            temperature = quantity.temperature
            masses = cover_masses(side, covers, order, temperature, tile_positions)
            found[reader, temperature] = TextLaw(covers, masses, logprobs)
    return found


def _next_tokens(
    chunks: Chunks, reader: Reader, side: Side, values: Mapping[Quantity, Tensor]
) -> dict[tuple[Reader, float], NextTokens]:
    """Return one model's next-token distributions, at the temperatures of its tokens' measures."""
    if chunks.shared is None:
        return {}
    is_own = reader == "student"
    first = chunks.first if is_own else chunks.first_of_teacher
    shared = chunks.shared[0 if is_own else 1]
    temperatures = [q.temperature for q in values if isinstance(q, OutcomeLogProb)]
    return {(reader, t): NextTokens(side, first, shared, t) for t in temperatures}


def _teacher_scale(batch: DistillBatch) -> float:
    """Return the dataset's tokens in the step over the teacher's; 1 outside of training."""
    dataset = SOURCES.index("dataset")
    if batch.step_counts is None or not batch.teacher_tokens:
        return 1.0
    return batch.step_counts[dataset] / max(1, batch.teacher_tokens[dataset])


def chunked_loss(
    terms: Sequence[WeightedTerm], about: Measured, values: ChunkValues
) -> WeightedLoss:
    """Return the weighted loss of a micro-batch whose teacher has another tokenizer.

    Terms that use the teacher sum over chunks, the others over positions.

    Args:
        terms: The terms and their factors.
        about: Source, row, sampler and rewards of the student's positions, without values.
        values: The measured tokens.
    """
    own = {key[1]: found for key, found in values.tokens.items() if key[0] == "student"}
    at_tokens = replace(about, values=own)
    forms = [replace(w, term=_over_chunks(w.term, values)) for w in terms]
    return weighted_loss(forms, at_tokens)


def _over_chunks(term: Term, values: ChunkValues) -> Term:
    if not any(quantity.needs_teacher for quantity in term.quantities):
        return term
    chunks = values.chunks

    def loss(about: Measured) -> LossOutput:
        first = chunks.first
        found = term.loss(
            Measured(
                values={quantity: values.of(quantity) for quantity in term.quantities},
                source=about.source[first],
                row=about.row[first],
                sampler_logprobs=chunks.sums(about.sampler_logprobs, chunks.student),
                credits={name: credit[first] for name, credit in about.credits.items()},
                has_chunks=True,
            )
        )
        return replace(found, count=about.mask(term.sources).sum())

    return replace(term, loss=loss)
