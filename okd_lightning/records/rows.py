"""Training rows from examples and rollouts, and micro-batches and records from rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor

from okd_lightning.records.batches import (
    SOURCES,
    DistillBatch,
    Example,
    Source,
    TrainingRow,
)
from okd_lightning.records.chunks import AlignedResponse
from okd_lightning.records.collation import collate
from okd_lightning.records.requests import Response, Rollout, ToolUse, stretches

_T = TypeVar("_T")

RowReader: TypeAlias = Callable[[Sequence[TrainingRow]], list[TrainingRow]]
"""From rows to rows as the teacher reads them."""


class Decode(Protocol):
    """Ids to text, with or without special tokens."""

    def __call__(self, ids: Sequence[int], special_tokens: bool = False) -> str:
        """Return the text of ``ids``."""


def dataset_row(example: Example) -> TrainingRow:
    """Return a row with the dataset response.

    Loss lies on the response and on earlier assistant turns of the prompt. Where the teacher has
    its own prompt, only the response carries loss, because only it is in both sequences.
    """
    prompt_mask = example.prompt_mask
    if example.teacher_prompt_ids:
        prompt_mask = (False,) * len(example.prompt_ids)
    return TrainingRow(
        index=example.index,
        source="dataset",
        input_ids=example.prompt_ids + example.response_ids,
        mask=prompt_mask + (True,) * len(example.response_ids),
        prompt_length=len(example.prompt_ids),
        teacher_prompt_ids=example.teacher_prompt_ids,
        teacher=example.teacher,
        images=example.images,
        teacher_images=example.teacher_images,
    )


def sampled_row(
    example: Example,
    source: Source,
    response: Response,
    credits: Mapping[str, float] | None = None,
) -> TrainingRow:
    """Return a row with a sampled response; only sampled tokens carry loss.

    Args:
        example: The example of the prompt.
        source: Generator of the response.
        response: The response.
        credits: The response's advantage in each reward term, by the term's name.
    """
    return TrainingRow(
        index=example.index,
        source=source,
        input_ids=example.prompt_ids + response.ids,
        mask=(False,) * len(example.prompt_ids) + response.mask,
        prompt_length=len(example.prompt_ids),
        sampler_logprobs=response.logprobs,
        credits=credits or {},
        teacher_prompt_ids=example.teacher_prompt_ids,
        stop_reason=response.stop_reason,
        merges_ends=response.merges_ends,
        teacher=example.teacher,
        images=example.images,
        teacher_images=example.teacher_images,
    )


def sampled_rows(
    examples: Sequence[Example],
    source: Source,
    responses: Sequence[Response],
    credits: Mapping[str, Sequence[float]] | None = None,
) -> list[TrainingRow]:
    """Return one row a response; see ``sampled_row``.

    Args:
        examples: The examples of the prompts, in the order of the responses.
        source: Generator of the responses.
        responses: The responses.
        credits: One advantage a response, by the reward term's name.
    """
    columns = credits or {}
    return [
        sampled_row(example, source, response, {name: columns[name][i] for name in columns})
        for i, (example, response) in enumerate(zip(examples, responses, strict=True))
    ]


def count_by_source(rows: Sequence[TrainingRow]) -> Tensor:
    """Count loss tokens and rows of each source: [2, sources], int64."""
    counts = torch.zeros(2, len(SOURCES), dtype=torch.int64)
    for row in rows:
        counts[:, SOURCES.index(row.source)] += torch.tensor([row.num_loss_tokens, 1])
    return counts


def count_chunks(rows: Sequence[TrainingRow]) -> Tensor:
    """Count the tokens of rows whose teacher has another tokenizer: [5, sources], int64.

    Returns:
        The teacher's tokens in chunks; the student's in responses; and of these, those that are one
        token of the teacher, that have no chunk, and whose chunk its tokenizer would write
        otherwise.
    """
    counts = torch.zeros(5, len(SOURCES), dtype=torch.int64)
    for row in rows:
        found = row.aligned or AlignedResponse()
        own, others = (
            sum(end - start for start, end in spans)
            for spans in (
                [span.student for span in found.spans],
                [span.teacher for span in found.spans],
            )
        )
        total = own + found.num_unaligned + found.num_noncanonical
        numbers = [
            others,
            total,
            found.num_one_to_one,
            found.num_unaligned,
            found.num_noncanonical,
        ]
        counts[:, SOURCES.index(row.source)] += torch.tensor(numbers)
    return counts


def chunk_metrics(counts: Tensor) -> dict[str, float]:
    """Return logged shares of a step's response tokens, from ``count_chunks`` over all ranks."""
    total = max(1, int(counts[1].sum()))
    names = ("one_to_one", "unaligned", "noncanonical")
    shares = counts[2:].sum(-1) / total
    return {f"train/{name}_tokens": float(s) for name, s in zip(names, shares, strict=True)}


def by_teacher(
    rows: Sequence[TrainingRow],
    examples: Sequence[Example],
    reduce_sum: Callable[[Tensor], Tensor],
) -> dict[str, Any]:
    """Return an optimizer step's counts by teacher, as fields of its batches.

    Args:
        rows: This rank's rows of the step.
        examples: The whole dataset, the same on all ranks.
        reduce_sum: Sums an int64 tensor over all ranks; called where there are several teachers.

    Returns:
        ``teacher_counts`` and ``teachers_present``; nothing where there is one teacher for all.
    """
    num_teachers = 1 + max(example.teacher for example in examples)
    if not num_teachers:
        return {}
    counts = torch.zeros(num_teachers, len(SOURCES), dtype=torch.int64)
    for row in rows:
        counts[row.teacher, SOURCES.index(row.source)] += row.num_loss_tokens
    of_step = tuple(tuple(of_one) for of_one in reduce_sum(counts).tolist())
    present = tuple(number for number, of_one in enumerate(of_step) if any(of_one))
    return {"teacher_counts": of_step, "teachers_present": present}


def micro_batches(rows: Sequence[TrainingRow], num_batches: int) -> list[DistillBatch]:
    """Cut one rank's rows of an optimizer step into micro-batches of similar lengths.

    Always returns ``num_batches``, so that all ranks do the same number of passes. If there are too
    few rows, the last batches are one fully masked row each, which contributes zero.

    Args:
        rows: At least one row.
        num_batches: Micro-batches an optimizer step.
    """
    by_length = sorted(rows, key=lambda row: -row.num_tokens)
    size = -(-len(rows) // num_batches)
    batches = [collate(by_length[i : i + size]) for i in range(0, len(rows), size)]
    while len(batches) < num_batches:
        batches.append(collate([fully_masked(by_length[-1])]))
    return batches


def share(items: Sequence[_T], rank: int, world_size: int) -> Sequence[_T]:
    """Return the contiguous part of ``items`` of one rank; sizes differ by one at most."""
    return items[len(items) * rank // world_size : len(items) * (rank + 1) // world_size]


def fully_masked(row: TrainingRow) -> TrainingRow:
    """Return the row fully masked: it is computed and contributes zero."""
    return TrainingRow(
        index=row.index,
        source=row.source,
        input_ids=row.input_ids,
        mask=(False,) * len(row.mask),
        prompt_length=row.prompt_length,
        teacher_prompt_ids=row.teacher_prompt_ids,
        aligned=None if row.aligned is None else row.aligned.without_chunks(),
        teacher=row.teacher,
        images=row.images,
        teacher_images=row.teacher_images,
    )


def rollout_metrics(rollouts: Sequence[tuple[Rollout, float]]) -> dict[str, float]:
    """Return logged metrics of rollouts: speed, lengths in tokens, shares that ended with eos.

    Tokens are sampled tokens; lengths include tool results. Utilisation is the share of row-steps
    (a row in a forward pass) that produced a token.

    Args:
        rollouts: Rollouts and their seconds; an empty sequence gives no metrics.
    """
    if not rollouts:
        return {}
    seconds = sum(time for _, time in rollouts)
    num_tokens = sum(rollout.num_tokens for rollout, _ in rollouts)
    responses = [response for rollout, _ in rollouts for response in rollout]
    lengths = [len(response.ids) for response in responses]
    ended = sum(response.stop_reason == "eos" for response in responses)
    num_row_steps = sum(rollout.num_row_steps for rollout, _ in rollouts)
    utilisation = {"rollout/utilisation": num_tokens / num_row_steps} if num_row_steps else {}
    gaps = [rollout.engine_gap for rollout, _ in rollouts if rollout.engine_gap is not None]
    return {
        "rollout/tokens_per_second": num_tokens / max(seconds, 1e-9),
        "rollout/tokens": float(num_tokens),
        "rollout/seconds": seconds,
        "rollout/mean_length": sum(lengths) / len(lengths),
        "rollout/eos_share": ended / len(lengths),
        "rollout/empty_share": lengths.count(0) / len(lengths),
        **_tool_metrics([r.tool_use for r in responses if r.tool_use is not None]),
        **utilisation,
        **({"rollout/engine_gap": max(gaps)} if gaps else {}),
    }


def _tool_metrics(uses: Sequence[ToolUse]) -> dict[str, float]:
    if not uses:
        return {}
    return {
        "rollout/tool_calls": float(sum(use.calls for use in uses)),
        "rollout/tool_errors": float(sum(use.errors for use in uses)),
        "rollout/tool_cuts": float(sum(use.cuts for use in uses)),
        "rollout/mean_turns": sum(use.turns for use in uses) / len(uses),
    }


def response_record(batch: DistillBatch, row: int, decode: Decode) -> dict[str, Any]:
    """Return a row for the generations on disk: prompt and response as text.

    ``text`` is both of them with all special tokens. The response is the whole conversation after
    the prompt. ``num_tokens`` counts sampled tokens. With tool results, ``turns`` lists the parts
    of model and tools.
    """
    start, end = int(batch.prompt_lengths[row]), int(batch.lengths[row])
    ids, own = batch.input_ids[row, :end].tolist(), batch.mask[row, :end].tolist()
    parts = stretches(ids[start:], own[start:])
    record = {
        "index": int(batch.index[row]),
        "prompt": decode(ids[:start]),
        "response": decode(ids[start:]),
        "text": decode(ids, special_tokens=True),
        "num_tokens": sum(own[start:]),
    }
    if len(parts) > 1:
        record["turns"] = [
            {"by": "model" if is_own else "tools", "text": decode(part)} for part, is_own in parts
        ]
    return record


def generation_records(batch: DistillBatch, decode: Decode) -> list[dict[str, Any]]:
    """Return a record of every sampled response of a batch; rows without one are left out.

    Args:
        batch: Rows with sampled responses.
        decode: See ``Decode``.
    """
    return [
        response_record(batch, row, decode) | {"stop_reason": reason}
        for row, reason in enumerate(batch.stop_reasons)
        if reason and batch.prompt_lengths[row] < batch.lengths[row]
    ]
