"""Collation of ragged rows into the padded tensors of one micro-batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from okd_lightning.records.batches import SOURCES, DistillBatch, TrainingRow
from okd_lightning.records.chunks import Chunks


def _padded(rows: Sequence[TrainingRow], pad_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids [batch, seq], lengths [batch] and masks [batch, seq] of rows."""
    lengths = torch.tensor([len(row.input_ids) for row in rows])
    shape = (len(rows), int(lengths.max()))
    input_ids = torch.full(shape, pad_id, dtype=torch.int64)
    mask = torch.zeros(shape, dtype=torch.bool)
    for i, row in enumerate(rows):
        input_ids[i, : lengths[i]] = torch.tensor(row.input_ids)
        mask[i, : lengths[i]] = torch.tensor(row.mask)
    return input_ids, lengths, mask


def _chunks(rows: Sequence[TrainingRow]) -> Chunks | None:
    """Number the chunks of all rows; None where the teacher reads the student's ids."""
    if all(row.aligned is None for row in rows):
        return None
    student: list[int] = []
    teacher: list[int] = []
    num = 0
    for row in rows:
        assert row.aligned is not None, "rows with and without a response in the teacher's ids"
        own, other = dict[int, int](), dict[int, int]()
        for number, span in enumerate(row.aligned.spans, start=num):
            own.update((row.prompt_length + place, number) for place in range(*span.student))
            other.update((place, number) for place in range(*span.teacher))
        num += len(row.aligned.spans)
        student += [own.get(i, -1) for i, has_loss in enumerate(row.mask) if i and has_loss]
        teacher += [other[place] for place in sorted(other)]
    ids = torch.int64
    return Chunks(torch.tensor(student, dtype=ids), torch.tensor(teacher, dtype=ids), num)


def collate(rows: Sequence[TrainingRow], pad_id: int = 0) -> DistillBatch:
    """Right-pad rows into one micro-batch.

    Args:
        rows: At least one row.
        pad_id: Id after a row's end; any value, it is never read.
    """
    input_ids, lengths, mask = _padded(rows, pad_id)
    logprobs = torch.zeros(input_ids.shape, dtype=torch.float32)
    for i, row in enumerate(rows):
        if row.sampler_logprobs:
            end = len(row.input_ids)
            logprobs[i, row.prompt_length : end] = torch.tensor(row.sampler_logprobs)
    teacher: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
    if any(row.teacher_prompt_ids or row.aligned is not None for row in rows):
        teacher = _padded([row.teacher_row for row in rows], pad_id)
    return DistillBatch(
        input_ids=input_ids,
        lengths=lengths,
        mask=mask,
        source=torch.tensor([SOURCES.index(row.source) for row in rows]),
        index=torch.tensor([row.index for row in rows]),
        prompt_lengths=torch.tensor([row.prompt_length for row in rows]),
        sampler_logprobs=logprobs,
        credits={
            name: torch.tensor([row.credits.get(name, 0.0) for row in rows])
            for name in sorted({name for row in rows for name in row.credits})
        },
        teacher_input_ids=teacher[0],
        teacher_lengths=teacher[1],
        teacher_mask=teacher[2],
        stop_reasons=tuple(row.stop_reason for row in rows),
        merges_ends=(
            torch.tensor([row.merges_ends for row in rows])
            if any(row.merges_ends for row in rows)
            else None
        ),
        chunks=_chunks(rows),
        teacher=(
            torch.tensor([row.teacher for row in rows])
            if any(row.teacher >= 0 for row in rows)
            else None
        ),
    )
