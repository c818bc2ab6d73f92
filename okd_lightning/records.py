"""The frozen records that cross a layer: what a prompt, a rollout, a batch and a loss term are.

Owns the shapes and nothing else: no tokenizer, no model and no Lightning. Rows of token ids are
ragged tuples until a batch is collated, because rows of different lengths are the normal case.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

Source: TypeAlias = Literal["dataset", "student", "teacher"]
"""Who wrote the response of a row."""

SOURCES: tuple[Source, ...] = ("dataset", "student", "teacher")
"""A row's source is stored as the index into this tuple."""


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
    """

    index: int
    prompt_ids: tuple[int, ...]
    prompt_mask: tuple[bool, ...]
    response_ids: tuple[int, ...]
    prompt: str
    response: str


@dataclass(frozen=True)
class PromptBatch:
    """Prompts for a rollout engine, in any number: the engine batches and sorts them itself.

    Attributes:
        input_ids: The prompts, ragged.
        index: The data set row of each prompt.
        sample: Which of the several samples of its prompt this is (0 where only one is drawn).
    """

    input_ids: tuple[tuple[int, ...], ...]
    index: tuple[int, ...]
    sample: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class Rollout:
    """What an engine wrote for a PromptBatch, row by row in the same order.

    Attributes:
        response_ids: The sampled ids, ragged, with the end-of-sequence id where one was drawn.
        logprobs: log-probability (nats) of each sampled id under the distribution it was drawn
            from, so after temperature, top-k and top-p.
        stop_reasons: "eos" or "length" for each row.
        num_row_steps: Rows of all forward passes that the writing took; 0 where the engine does
            not say.
    """

    response_ids: tuple[tuple[int, ...], ...]
    logprobs: tuple[tuple[float, ...], ...]
    stop_reasons: tuple[str, ...]
    num_row_steps: int = 0

    def __len__(self) -> int:
        return len(self.response_ids)

    @property
    def num_tokens(self) -> int:
        """Sampled tokens in all rows."""
        return sum(len(ids) for ids in self.response_ids)


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
    """

    index: int
    source: Source
    input_ids: tuple[int, ...]
    mask: tuple[bool, ...]
    prompt_length: int
    sampler_logprobs: tuple[float, ...] = ()
    credits: Mapping[str, float] = field(default_factory=dict)

    @property
    def num_loss_tokens(self) -> int:
        """Masked-in tokens; the first id of a sequence is predicted by nothing and never counts."""
        return sum(self.mask[1:])


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
            number a source: what the loss is divided by. None outside training.
        metrics: Numbers about the making of this batch (rollout speed and lengths) to be logged.
        credits: [batch] a reward term, by its name; 0 on rows that have none.
    """

    input_ids: Tensor
    lengths: Tensor
    mask: Tensor
    source: Tensor
    index: Tensor
    prompt_lengths: Tensor
    sampler_logprobs: Tensor
    step_counts: tuple[int, ...] | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    credits: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @property
    def attention_mask(self) -> Tensor:
        """[batch, seq] True on real tokens."""
        positions = torch.arange(self.input_ids.shape[1], device=self.lengths.device)
        return positions < self.lengths[:, None]

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
        return replace(self, **moved)


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


def collate(rows: Sequence[TrainingRow], pad_id: int = 0) -> DistillBatch:
    """Right-pad rows into one micro-batch.

    Args:
        rows: At least one row.
        pad_id: What to write behind a row's end; its value never matters.
    """
    width = max(len(row.input_ids) for row in rows)
    shape = (len(rows), width)
    input_ids = torch.full(shape, pad_id, dtype=torch.int64)
    mask = torch.zeros(shape, dtype=torch.bool)
    logprobs = torch.zeros(shape, dtype=torch.float32)
    for i, row in enumerate(rows):
        length = len(row.input_ids)
        input_ids[i, :length] = torch.tensor(row.input_ids)
        mask[i, :length] = torch.tensor(row.mask)
        if row.sampler_logprobs:
            logprobs[i, row.prompt_length : length] = torch.tensor(row.sampler_logprobs)
    return DistillBatch(
        input_ids=input_ids,
        lengths=torch.tensor([len(row.input_ids) for row in rows]),
        mask=mask,
        source=torch.tensor([SOURCES.index(row.source) for row in rows]),
        index=torch.tensor([row.index for row in rows]),
        prompt_lengths=torch.tensor([row.prompt_length for row in rows]),
        sampler_logprobs=logprobs,
        credits={
            name: torch.tensor([row.credits.get(name, 0.0) for row in rows])
            for name in sorted({name for row in rows for name in row.credits})
        },
    )
