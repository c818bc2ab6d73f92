"""From examples and rollouts to training rows, and from rows to stamped micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from okd_lightning.records import (
    SOURCES,
    DistillBatch,
    Example,
    Rollout,
    Source,
    TrainingRow,
    collate,
)

_T = TypeVar("_T")


def given_row(example: Example) -> TrainingRow:
    """A row with the data set's own response."""
    return TrainingRow(
        index=example.index,
        source="dataset",
        input_ids=example.prompt_ids + example.response_ids,
        mask=example.prompt_mask + (True,) * len(example.response_ids),
        prompt_length=len(example.prompt_ids),
    )


def written_row(
    example: Example,
    source: Source,
    ids: tuple[int, ...],
    logprobs: tuple[float, ...],
    credits: Mapping[str, float] | None = None,
) -> TrainingRow:
    """A row with a sampled response; loss lies on the sampled tokens alone."""
    return TrainingRow(
        index=example.index,
        source=source,
        input_ids=example.prompt_ids + ids,
        mask=(False,) * len(example.prompt_ids) + (True,) * len(ids),
        prompt_length=len(example.prompt_ids),
        sampler_logprobs=logprobs,
        credits=credits or {},
    )


def count_by_source(rows: Sequence[TrainingRow]) -> Tensor:
    """[sources] loss tokens of some rows, int64."""
    counts = torch.zeros(len(SOURCES), dtype=torch.int64)
    for row in rows:
        counts[SOURCES.index(row.source)] += row.num_loss_tokens
    return counts


def micro_batches(rows: Sequence[TrainingRow], num_batches: int) -> list[DistillBatch]:
    """Cut one optimizer step's rows of one rank into micro-batches of like lengths.

    Always ``num_batches`` of them, so that all ranks do the same number of passes: where rows are
    short, a batch is one row with nothing masked in, which contributes zero.

    Args:
        rows: At least one row.
        num_batches: Micro-batches an optimizer step.
    """
    by_length = sorted(rows, key=lambda row: -len(row.input_ids))
    size = -(-len(rows) // num_batches)
    batches = [collate(by_length[i : i + size]) for i in range(0, len(rows), size)]
    while len(batches) < num_batches:
        batches.append(collate([muted(by_length[-1])]))
    return batches


def share(items: Sequence[_T], rank: int, world_size: int) -> Sequence[_T]:
    """The contiguous part of ``items`` that belongs to one rank; sizes differ by one at most."""
    return items[len(items) * rank // world_size : len(items) * (rank + 1) // world_size]


def muted(row: TrainingRow) -> TrainingRow:
    """The same row with nothing masked in: it is computed and contributes zero."""
    return TrainingRow(
        index=row.index,
        source=row.source,
        input_ids=row.input_ids,
        mask=(False,) * len(row.mask),
        prompt_length=row.prompt_length,
    )


def rollout_metrics(rollouts: Sequence[tuple[Rollout, float]]) -> dict[str, float]:
    """What is logged about rollouts: speed, lengths in tokens, shares that ended by themselves.

    Utilisation is the share of row-steps (a row in a forward pass) that wrote a token.

    Args:
        rollouts: Each with the seconds that it took; with none there is nothing to log.
    """
    if not rollouts:
        return {}
    seconds = sum(time for _, time in rollouts)
    lengths = [len(ids) for rollout, _ in rollouts for ids in rollout.response_ids]
    ended = sum(reason == "eos" for rollout, _ in rollouts for reason in rollout.stop_reasons)
    num_row_steps = sum(rollout.num_row_steps for rollout, _ in rollouts)
    utilisation = {"rollout/utilisation": sum(lengths) / num_row_steps} if num_row_steps else {}
    return {
        "rollout/tokens_per_second": sum(lengths) / max(seconds, 1e-9),
        "rollout/tokens": float(sum(lengths)),
        "rollout/seconds": seconds,
        "rollout/mean_length": sum(lengths) / len(lengths),
        "rollout/eos_share": ended / len(lengths),
        "rollout/empty_share": lengths.count(0) / len(lengths),
        **utilisation,
    }


def generation_records(
    batch: DistillBatch, decode: Callable[[Sequence[int]], str], eos_ids: Sequence[int]
) -> list[dict[str, Any]]:
    """Prompt and generated response of every row, as text; rows without a response are left out.

    Args:
        batch: Rows with sampled responses.
        decode: Ids to text.
        eos_ids: Ids that end a response.
    """
    records = []
    for ids, length, start, index in zip(
        batch.input_ids.tolist(),
        batch.lengths.tolist(),
        batch.prompt_lengths.tolist(),
        batch.index.tolist(),
        strict=True,
    ):
        response = ids[start:length]
        if response:
            records.append(
                {
                    "index": index,
                    "prompt": decode(ids[:start]),
                    "response": decode(response),
                    "num_tokens": len(response),
                    "stop_reason": "eos" if response[-1] in eos_ids else "length",
                }
            )
    return records
