"""Frozen records that cross a layer: examples, training rows, batches and loss outputs.

Owns the shapes only: no tokenizer, no model and no Lightning. Rows of token ids are ragged tuples
until a batch is collated (``collation``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from okd_lightning.records.chunks import AlignedResponse, Chunks
from okd_lightning.records.images import ImageInputs, ImageRef, named
from okd_lightning.records.requests import Chat, Generator, Prompt
from okd_lightning.records.sequences import Sequences

Source: TypeAlias = Literal["dataset", "student", "teacher"]
"""Generator of a row's response; ``dataset`` for a dataset response."""

SOURCES: tuple[Source, ...] = ("dataset", "student", "teacher")
"""A row's source is stored as the index into this tuple."""


@dataclass(frozen=True)
class Example:
    """One tokenized row of a dataset.

    Attributes:
        index: The row's number in its dataset; keys the sampling noise.
        prompt_ids: Token ids of the prompt; a rollout continues them.
        prompt_mask: Same length; True on the tokens of earlier assistant turns, which carry loss.
        response_ids: The dataset response with its end-of-sequence id, unless it was cut; may be
            empty where the dataset has only prompts.
        prompt: The prompt as text, for tables and generations on disk.
        response: The dataset response as text; the reference of task metrics. Empty if there is
            none.
        teacher_prompt_ids: The teacher's own prompt; empty if it reads ``prompt_ids``.
        chat: Messages and tools of the prompt; None if it is plain text.
        teacher: Number of the row's teacher, where there are several to choose from; else -1.
        images: The prompt's images, in order.
        teacher_images: Those of the teacher's own prompt.
    """

    index: int
    prompt_ids: tuple[int, ...]
    prompt_mask: tuple[bool, ...]
    response_ids: tuple[int, ...]
    prompt: str
    response: str
    teacher_prompt_ids: tuple[int, ...] = ()
    chat: Chat | None = None
    teacher: int = -1
    images: tuple[ImageRef, ...] = ()
    teacher_images: tuple[ImageRef, ...] = ()

    @property
    def question(self) -> str:
        """The prompt for display: a chat's last user message, or the whole prompt."""
        text = (self.chat.question if self.chat is not None else "") or self.prompt
        return named(text, self.images)

    def prompt_for(self, generator: Generator, sample: int = 0) -> Prompt:
        """Return the prompt of a request to a generator: the teacher's own one if it has one."""
        is_privileged = generator == "teacher" and bool(self.teacher_prompt_ids)
        ids = self.teacher_prompt_ids if is_privileged else self.prompt_ids
        images = self.teacher_images if is_privileged else self.images
        return Prompt(ids, self.index, sample, self.chat, teacher=self.teacher, images=images)


@dataclass(frozen=True)
class TrainingRow:
    """One sequence before collation: prompt, response and loss mask.

    Attributes:
        index: The dataset row.
        source: Generator of the response.
        input_ids: Prompt and response.
        mask: True on the tokens that carry loss.
        prompt_length: Number of prompt tokens in ``input_ids``.
        sampler_logprobs: One number per response token (nats) where the response was sampled.
        credits: The response's advantage in each reward term, by the term's name.
        teacher_prompt_ids: The teacher's own prompt; empty if it reads the student's. A row with
            one has no loss on its prompt.
        stop_reason: Why a sampled response ends; empty for other rows.
        merges_ends: Whether the sampler's log-probability of an end is that of all end ids.
        aligned: The response in the ids of a teacher with another tokenizer; None for a teacher
            that reads the student's ids.
        teacher: Number of the row's teacher, where there are several to choose from; else -1.
        images: The prompt's images, in order.
        teacher_images: Those of the teacher's own prompt.
    """

    index: int
    source: Source
    input_ids: tuple[int, ...]
    mask: tuple[bool, ...]
    prompt_length: int
    sampler_logprobs: tuple[float, ...] = ()
    credits: Mapping[str, float] = field(default_factory=dict)
    teacher_prompt_ids: tuple[int, ...] = ()
    stop_reason: str = ""
    merges_ends: bool = False
    aligned: AlignedResponse | None = None
    teacher: int = -1
    images: tuple[ImageRef, ...] = ()
    teacher_images: tuple[ImageRef, ...] = ()

    @property
    def teacher_row(self) -> TrainingRow:
        """The row as the teacher reads it; the row itself if it reads the student's."""
        if self.aligned is not None:
            return self._retokenized(self.aligned)
        if not self.teacher_prompt_ids:
            return self
        assert not any(self.mask[: self.prompt_length]), "loss on a prompt that one side reads"
        length = len(self.teacher_prompt_ids)
        return replace(
            self,
            input_ids=self.teacher_prompt_ids + self.input_ids[self.prompt_length :],
            mask=(False,) * length + self.mask[self.prompt_length :],
            prompt_length=length,
            images=self.teacher_images,
        )

    def _retokenized(self, response: AlignedResponse) -> TrainingRow:
        """Return the row in the teacher's ids, with loss on the tokens within chunks."""
        length = len(self.teacher_prompt_ids)
        inside = {place for span in response.spans for place in range(*span.teacher)}
        own = tuple(place in inside for place in range(len(response.teacher_ids)))
        return replace(
            self,
            input_ids=self.teacher_prompt_ids + response.teacher_ids,
            mask=(False,) * length + own,
            prompt_length=length,
        )

    @property
    def num_tokens(self) -> int:
        """Tokens of the student's or the teacher's sequence, whichever is longer."""
        if self.aligned is not None:
            num_read = len(self.teacher_prompt_ids) + len(self.aligned.teacher_ids)
            return max(len(self.input_ids), num_read)
        num_more = max(0, len(self.teacher_prompt_ids) - self.prompt_length)
        return len(self.input_ids) + num_more

    @property
    def num_loss_tokens(self) -> int:
        """Tokens that carry loss; never the first id of a sequence, which nothing predicts."""
        return sum(self.mask[1:])


def count_by_source(rows: Sequence[TrainingRow]) -> Tensor:
    """Count loss tokens and rows of each source: [2, sources], int64."""
    counts = torch.zeros(2, len(SOURCES), dtype=torch.int64)
    for row in rows:
        counts[:, SOURCES.index(row.source)] += torch.tensor([row.num_loss_tokens, 1])
    return counts


@dataclass(frozen=True)
class SampledCounts:
    """Counts of the student's responses in one optimizer step.

    Attributes:
        rollouts: Responses over all micro-batches and ranks.
        mean_tokens: Loss tokens per response in earlier rollout batches.
        max_tokens: Longest allowed response, in tokens.
    """

    rollouts: int
    mean_tokens: float
    max_tokens: int


@dataclass(frozen=True)
class DistillBatch:
    """One micro-batch of right-padded sequences.

    Attributes:
        input_ids: [batch, seq] ids; ids after a row's length are never read.
        lengths: [batch] real tokens of each row; padding is identified by length, not by id.
        mask: [batch, seq] True on the tokens that carry loss (aligned with ``input_ids``: the
            model predicts token n from position n-1).
        source: [batch] index into ``SOURCES``.
        index: [batch] dataset row.
        prompt_lengths: [batch] prompt tokens of each row.
        sampler_logprobs: [batch, seq] nats, aligned with ``input_ids``; 0 where nothing was drawn.
        step_counts: Loss tokens of the whole optimizer step (all micro-batches, all ranks), one
            number per source. None outside training.
        sampled: Counts of the student's responses in the step, for the divisor of their loss.
            None outside training.
        metrics: Rollout speed and lengths of this batch, to be logged.
        credits: [batch] advantage of each reward term, by its name; 0 on rows without one.
        teacher_input_ids: [batch, teacher_seq] the teacher's own prompts with the same responses;
            rows without an own prompt are as in ``input_ids``. None if it reads ``input_ids``.
        teacher_lengths: [batch] real tokens of each of these rows.
        teacher_mask: [batch, teacher_seq] True on the same response tokens as ``mask``, row by row
            in the same order.
        stop_reasons: Why each row's sampled response ends; empty texts for other rows, () if not
            recorded.
        merges_ends: [batch] True where the sampler's log-probability of an end is that of all end
            ids together; None for no row.
        chunks: Units of text with a probability under both models, where the teacher has another
            tokenizer, whose ids ``teacher_input_ids`` holds then; None for a teacher that reads the
            student's ids.
        teacher_tokens: As ``step_counts``, of the teacher's loss tokens where it has another
            tokenizer; () otherwise.
        teacher: [batch] number of each row's teacher; None where there is one for all rows.
        teachers_present: Numbers of the teachers that have rows in the optimizer step (in
            evaluation: in the whole set), the same on all ranks; None if not known.
        teacher_counts: Loss tokens of the whole optimizer step by teacher and source. () outside
            training, and where there is one teacher for all rows.
        images: Images of each row, as the student reads it; () where no row has one.
        teacher_images: Images of each row, as the teacher reads it; () likewise.
        image_inputs: The student's inputs for ``images``; None before they are made.
        teacher_image_inputs: The teacher's inputs for ``teacher_images``; None likewise.
    """

    input_ids: Tensor
    lengths: Tensor
    mask: Tensor
    source: Tensor
    index: Tensor
    prompt_lengths: Tensor
    sampler_logprobs: Tensor
    step_counts: tuple[int, ...] | None = None
    sampled: SampledCounts | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    credits: Mapping[str, Tensor] = field(default_factory=dict)
    teacher_input_ids: Tensor | None = None
    teacher_lengths: Tensor | None = None
    teacher_mask: Tensor | None = None
    stop_reasons: tuple[str, ...] = ()
    merges_ends: Tensor | None = None
    chunks: Chunks | None = None
    teacher_tokens: tuple[int, ...] = ()
    teacher: Tensor | None = None
    teachers_present: tuple[int, ...] | None = None
    teacher_counts: tuple[tuple[int, ...], ...] = ()
    images: tuple[tuple[ImageRef, ...], ...] = ()
    teacher_images: tuple[tuple[ImageRef, ...], ...] = ()
    image_inputs: ImageInputs | None = None
    teacher_image_inputs: ImageInputs | None = None

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @property
    def attention_mask(self) -> Tensor:
        """[batch, seq] True on real tokens."""
        return self.student_reads.attention_mask

    @cached_property
    def student_reads(self) -> Sequences:
        """The sequences that the student reads."""
        return Sequences(self.input_ids, self.lengths, self.mask, self.image_inputs)

    @cached_property
    def teacher_reads(self) -> Sequences:
        """The sequences that the teacher reads; the student's if the teacher has no own prompts."""
        images = self.teacher_image_inputs
        if self.teacher_input_ids is None:
            own = self.student_reads
            return own if images is None else replace(own, images=images)
        assert self.teacher_lengths is not None
        assert self.teacher_mask is not None
        return Sequences(self.teacher_input_ids, self.teacher_lengths, self.teacher_mask, images)

    @property
    def has_own_reads(self) -> bool:
        """True where the teacher reads other sequences than the student, or other image inputs."""
        return self.teacher_input_ids is not None or self.teacher_image_inputs is not None

    @cached_property
    def teacher_of_rows(self) -> list[int]:
        """``teacher``, on the host; empty where there is one for all rows."""
        numbers: list[int] = [] if self.teacher is None else self.teacher.tolist()
        return numbers

    def of_rows(self, rows: Sequence[int]) -> DistillBatch:
        """Return some of the rows.

        Args:
            rows: At least one, ascending.
        """
        index = torch.tensor(rows, device=self.input_ids.device)
        part: dict[str, Any] = {
            name: getattr(self, name)[index]
            for name in self.__dataclass_fields__
            if isinstance(getattr(self, name), Tensor)
        }
        part["credits"] = {name: values[index] for name, values in self.credits.items()}
        for name in ("stop_reasons", "images", "teacher_images"):
            values = getattr(self, name)
            part[name] = tuple(values[row] for row in rows if values)
        own = self.student_reads.of_rows(rows)
        other = self.teacher_reads.of_rows(rows) if self.has_own_reads else None
        return replace(self, **part)._reading(own, other)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> DistillBatch:
        """Return the batch on another device (Lightning calls this)."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=non_blocking)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        moved["credits"] = {
            name: values.to(device, non_blocking=non_blocking)
            for name, values in self.credits.items()
        }
        if self.chunks is not None:
            moved["chunks"] = self.chunks.to(device, non_blocking)
        # cached properties are moved too: computing them on the device would wait for it
        own = self.student_reads.to(device, non_blocking)
        other = self.teacher_reads.to(device, non_blocking) if self.has_own_reads else None
        batch = replace(self, **moved)._reading(own, other)
        vars(batch)["teacher_of_rows"] = self.teacher_of_rows
        return batch

    def _reading(self, own: Sequences, other: Sequences | None) -> DistillBatch:
        """Return the batch with these sequences, whose image inputs are the batch's."""
        batch = self
        if own.images is not None or other is not None:
            others = None if other is None else other.images
            batch = replace(self, image_inputs=own.images, teacher_image_inputs=others)
        vars(batch)["student_reads"] = own
        if other is not None:
            vars(batch)["teacher_reads"] = other
        return batch


@dataclass(frozen=True)
class LossOutput:
    """Result of a loss term: an undivided sum and the number of tokens that it runs over.

    Attributes:
        sum: Scalar, nats summed over the term's tokens, with gradient.
        count: Scalar, number of these tokens in this micro-batch.
        metrics: Further detached sums over the same tokens, by name.
        by_teacher: [teachers] detached part of the sum over each teacher's tokens; None where there
            is one for all rows.
    """

    sum: Tensor
    count: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    by_teacher: Tensor | None = None

    def detached(self) -> LossOutput:
        """Return the same numbers without gradient."""
        metrics = {name: value.detach() for name, value in self.metrics.items()}
        return LossOutput(self.sum.detach(), self.count, metrics, self.by_teacher)

    def __add__(self, other: LossOutput) -> LossOutput:
        """Add the sums and counts of two disjoint sets of positions."""
        metrics = {name: value + other.metrics[name] for name, value in self.metrics.items()}
        parts = self.by_teacher
        if parts is not None and other.by_teacher is not None:
            parts = parts + other.by_teacher
        return LossOutput(self.sum + other.sum, self.count + other.count, metrics, parts)
