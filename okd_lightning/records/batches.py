"""The frozen records that cross a layer: what a prompt, a rollout, a batch and a loss term are.

Owns the shapes and nothing else: no tokenizer, no model and no Lightning. Rows of token ids are
ragged tuples until a batch is collated (``collation``): rows of different lengths are the rule.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from okd_lightning.records.sequences import Sequences

Source: TypeAlias = Literal["dataset", "student", "teacher"]
"""Who wrote the response of a row."""

SOURCES: tuple[Source, ...] = ("dataset", "student", "teacher")
"""A row's source is stored as the index into this tuple."""

STOP_REASONS: tuple[str, ...] = ("eos", "length", "turns")
"""Why a response ends: by itself, cut at its limit, or with a call in its last allowed turn."""


@dataclass(frozen=True)
class Chat:
    """What a chat's prompt was rendered from, kept where rollouts go on with it.

    Attributes:
        messages: As the chat template reads them, up to the response.
        tools: What the template lists as callable (JSON schemas); None for nothing.
    """

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] | None = None


@dataclass(frozen=True)
class Example:
    """One tokenized row of a data set.

    Attributes:
        index: The row's number in its data set; keys the sampling noise.
        prompt_ids: What the model reads first, and what a rollout continues.
        prompt_mask: Same length; True on the tokens of earlier assistant turns, which carry loss.
        response_ids: The given response with its end-of-sequence id, unless it was cut; may be
            empty where the data set has only prompts.
        prompt: The prompt as text, for tables and generations on disk.
        response: The given response as text; the reference of task metrics. Empty where none.
        teacher_prompt_ids: What the teacher reads in place of ``prompt_ids``; empty where it reads
            the same.
        chat: What the prompt was rendered from, where rollouts may call tools.
    """

    index: int
    prompt_ids: tuple[int, ...]
    prompt_mask: tuple[bool, ...]
    response_ids: tuple[int, ...]
    prompt: str
    response: str
    teacher_prompt_ids: tuple[int, ...] = ()
    chat: Chat | None = None

    def prompt_ids_of(self, author: Source) -> tuple[int, ...]:
        """What the one who writes a response reads first."""
        is_privileged = author == "teacher" and bool(self.teacher_prompt_ids)
        return self.teacher_prompt_ids if is_privileged else self.prompt_ids


@dataclass(frozen=True)
class PromptBatch:
    """Prompts for a rollout engine, in any number: the engine batches and sorts them itself.

    Attributes:
        input_ids: The prompts, ragged.
        index: The data set row of each prompt.
        sample: Which of the several samples of its prompt this is (0 where only one is drawn).
        chats: What the prompts were rendered from; () where nothing goes on with them.
        limits: Longest response of each row, in tokens, where that is less than the call's; () for
            none.
    """

    input_ids: tuple[tuple[int, ...], ...]
    index: tuple[int, ...]
    sample: tuple[int, ...]
    chats: tuple[Chat | None, ...] = ()
    limits: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class ToolUse:
    """What happened in one response that may call tools.

    Attributes:
        turns: Turns that the model wrote.
        calls: Calls that were answered.
        errors: Those of them that were answered with an error.
        cuts: Answers that were cut at the response's limit.
    """

    turns: int = 1
    calls: int = 0
    errors: int = 0
    cuts: int = 0


@dataclass(frozen=True)
class Rollout:
    """What an engine wrote for a PromptBatch, row by row in the same order.

    Attributes:
        response_ids: What stands behind the prompt, ragged: the sampled ids with the
            end-of-sequence id where one was drawn, and between turns what tools have answered.
        logprobs: log-probability (nats) of each sampled id under the distribution it was drawn
            from, so after temperature, top-k and top-p; 0 where an id was not sampled.
        stop_reasons: One of ``STOP_REASONS`` for each row.
        masks: True on the model's own tokens, ragged; () where all are.
        tool_use: One a row where tools could be called, else ().
        num_row_steps: Rows of all forward passes that the writing took; 0 where the engine does
            not say.
        engine_gap: Mean difference (nats) between the engine's log-probabilities of a few responses
            and the student's own; None where the student itself generates.
    """

    response_ids: tuple[tuple[int, ...], ...]
    logprobs: tuple[tuple[float, ...], ...]
    stop_reasons: tuple[str, ...]
    masks: tuple[tuple[bool, ...], ...] = ()
    tool_use: tuple[ToolUse, ...] = ()
    num_row_steps: int = 0
    engine_gap: float | None = None

    def __len__(self) -> int:
        return len(self.response_ids)

    @property
    def own_masks(self) -> tuple[tuple[bool, ...], ...]:
        """``masks``, also where all tokens are the model's own."""
        return self.masks or tuple((True,) * len(ids) for ids in self.response_ids)

    @property
    def num_tokens(self) -> int:
        """Sampled tokens in all rows."""
        return sum(sum(mask) for mask in self.own_masks)

    def turns(self, row: int) -> list[tuple[int, ...]]:
        """The ids of each turn that the model wrote in a row; a single empty one for nothing."""
        parts = stretches(self.response_ids[row], self.own_masks[row])
        return [ids for ids, is_own in parts if is_own] or [()]


def stretches(ids: Sequence[int], mask: Sequence[bool]) -> list[tuple[tuple[int, ...], bool]]:
    """A response cut where its author changes: ids, and whether the model wrote them."""
    pairs = zip(ids, mask, strict=True)
    return [
        (tuple(token for token, _ in part), is_own)
        for is_own, part in itertools.groupby(pairs, key=operator.itemgetter(1))
    ]


@dataclass(frozen=True)
class TrainingRow:
    """One sequence that is ready to be collated: an example's ids and where its loss lies.

    Attributes:
        index: The data set row it came from.
        source: Who wrote its response.
        input_ids: Prompt and response.
        mask: True on the tokens that carry loss.
        prompt_length: How many of ``input_ids`` are prompt.
        sampler_logprobs: One number a response token (nats) where the response was sampled.
        credits: What each reward term gives the response, by the term's name.
        teacher_prompt_ids: What the teacher reads in place of the prompt; empty where it reads the
            same. Such a row has no loss on its prompt.
        stop_reason: Why a sampled response ends; empty for other rows.
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

    @property
    def teacher_row(self) -> TrainingRow:
        """The same response behind the teacher's prompt; the row itself where there is none."""
        if not self.teacher_prompt_ids:
            return self
        assert not any(self.mask[: self.prompt_length]), "loss on a prompt that one side reads"
        length = len(self.teacher_prompt_ids)
        return replace(
            self,
            input_ids=self.teacher_prompt_ids + self.input_ids[self.prompt_length :],
            mask=(False,) * length + self.mask[self.prompt_length :],
            prompt_length=length,
        )

    @property
    def num_tokens(self) -> int:
        """Tokens of the longer one of what student and teacher read."""
        num_more = max(0, len(self.teacher_prompt_ids) - self.prompt_length)
        return len(self.input_ids) + num_more

    @property
    def num_loss_tokens(self) -> int:
        """Masked-in tokens; the first id of a sequence is predicted by nothing and never counts."""
        return sum(self.mask[1:])


@dataclass(frozen=True)
class SampledCounts:
    """The student's responses in one optimizer step, beside their tokens in ``step_counts``.

    Attributes:
        rollouts: How many there are, over all micro-batches and ranks.
        mean_tokens: Loss tokens per response in earlier rollout batches.
        max_tokens: The longest that a response may be.
    """

    rollouts: int
    mean_tokens: float
    max_tokens: int


@dataclass(frozen=True)
class DistillBatch:
    """One micro-batch of right-padded sequences.

    Attributes:
        input_ids: [batch, seq] ids; what stands behind a row's length is never read.
        lengths: [batch] real tokens of each row; padding is told by length, not by id.
        mask: [batch, seq] True on the tokens that carry loss (aligned with ``input_ids``: the
            model predicts token n from position n-1).
        source: [batch] index into ``SOURCES``.
        index: [batch] data set row.
        prompt_lengths: [batch] prompt tokens of each row.
        sampler_logprobs: [batch, seq] nats, aligned with ``input_ids``; 0 where nothing was drawn.
        step_counts: Loss tokens of the whole optimizer step (all micro-batches, all ranks), one
            number a source. None outside training.
        sampled: The student's responses in the step, for what their sum is divided by. None
            outside training.
        metrics: Numbers about the making of this batch (rollout speed and lengths) to be logged.
        credits: [batch] a reward term, by its name; 0 on rows that have none.
        teacher_input_ids: [batch, teacher_seq] what the teacher reads: its own prompts and the same
            responses. None where it reads ``input_ids``; rows without a prompt of their own then
            stand here as they stand there.
        teacher_lengths: [batch] real tokens of each of them.
        teacher_mask: [batch, teacher_seq] True on the same response tokens as ``mask``, row by row
            in the same order.
        stop_reasons: Why each row's sampled response ends; empty texts for other rows, () where
            nobody asks.
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

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @property
    def attention_mask(self) -> Tensor:
        """[batch, seq] True on real tokens."""
        return self.student_reads.attention_mask

    @cached_property
    def student_reads(self) -> Sequences:
        """The student's prompts and the responses."""
        return Sequences(self.input_ids, self.lengths, self.mask)

    @cached_property
    def teacher_reads(self) -> Sequences:
        """The teacher's prompts and the same responses; the student's where it has none."""
        if self.teacher_input_ids is None:
            return self.student_reads
        assert self.teacher_lengths is not None
        assert self.teacher_mask is not None
        return Sequences(self.teacher_input_ids, self.teacher_lengths, self.teacher_mask)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> DistillBatch:
        """The same batch on another device (Lightning calls this)."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=non_blocking)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        moved["credits"] = {
            name: values.to(device, non_blocking=non_blocking)
            for name, values in self.credits.items()
        }
        batch = replace(self, **moved)
        vars(batch)["student_reads"] = self.student_reads.to(device, non_blocking)
        if self.teacher_input_ids is not None:
            vars(batch)["teacher_reads"] = self.teacher_reads.to(device, non_blocking)
        return batch


@dataclass(frozen=True)
class LossOutput:
    """What a method's term hands back: a sum and what it was summed over; nobody divides early.

    Attributes:
        sum: Scalar, nats summed over the term's tokens, with gradient.
        count: Scalar, how many tokens of this micro-batch the sum runs over.
        metrics: Further detached sums over the same tokens, by name.
    """

    sum: Tensor
    count: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)

    def detached(self) -> LossOutput:
        """The same numbers without gradient."""
        metrics = {name: value.detach() for name, value in self.metrics.items()}
        return LossOutput(self.sum.detach(), self.count, metrics)

    def __add__(self, other: LossOutput) -> LossOutput:
        """The sums over both parts of some positions."""
        metrics = {name: value + other.metrics[name] for name, value in self.metrics.items()}
        return LossOutput(self.sum + other.sum, self.count + other.count, metrics)
