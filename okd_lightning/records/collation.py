"""From examples and rollouts to training rows, and from rows to padded micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from okd_lightning.records.batches import SOURCES, DistillBatch, Example, Source, TrainingRow
from okd_lightning.records.chunks import (
    AlignedResponse,
    Chunks,
    Cover,
    Covers,
    IntArray,
    PointIndex,
)
from okd_lightning.records.requests import Response

RowReader: TypeAlias = Callable[[Sequence[TrainingRow]], list[TrainingRow]]
"""Function from rows to rows as the teacher reads them."""

_Response: TypeAlias = tuple[AlignedResponse, Mapping[int, int], Mapping[int, int]]
"""A response, and maps from both sides' token indices to loss positions."""


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
    """Return one row per response; see ``sampled_row``.

    Args:
        examples: The examples of the prompts, in the order of the responses.
        source: Generator of the responses.
        responses: The responses.
        credits: One advantage per response, by the reward term's name.
    """
    columns = credits or {}
    return [
        sampled_row(example, source, response, {name: columns[name][i] for name in columns})
        for i, (example, response) in enumerate(zip(examples, responses, strict=True))
    ]


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
    student, teacher = list[int](), list[int]()
    responses: list[_Response] = []
    num = 0
    for row in rows:
        assert row.aligned is not None, "rows with and without a response in the teacher's ids"
        own, other = dict[int, int](), dict[int, int]()
        for number, span in enumerate(row.aligned.spans, start=num):
            own.update((row.prompt_length + place, number) for place in range(*span.student))
            other.update((place, number) for place in range(*span.teacher))
        num += len(row.aligned.spans)
        carries_loss = [i for i, has_loss in enumerate(row.mask) if i and has_loss]
        places = {i - row.prompt_length: len(student) + at for at, i in enumerate(carries_loss)}
        places_teacher = {place: len(teacher) + at for at, place in enumerate(sorted(other))}
        responses.append((row.aligned, places, places_teacher))
        student += [own.get(i, -1) for i in carries_loss]
        teacher += [other[place] for place in sorted(other)]
    points = _points(responses) if responses[0][0].points is not None else None
    return Chunks(_ints(student), _ints(teacher), num, points, responses[0][0].shared)


def _points(responses: Sequence[_Response]) -> PointIndex:
    """Number the sync points of all responses."""
    chunks: list[tuple[int, int]] = []
    sides: tuple[_SideCovers, _SideCovers] = (_SideCovers(), _SideCovers())
    num = 0
    for response, *positions in responses:
        points = response.points
        assert points is not None
        chunks += [(start + num, end + num) for start, end in points.chunks]
        for number, side in enumerate(sides):
            covers = (points.student, points.teacher)[number]
            side.add(covers, [place[number] for place in points.places], positions[number], num)
        num += len(points.places)
    start, end = _ints([one for one, _ in chunks]), _ints([other for _, other in chunks])
    first = responses[0][0].points
    assert first is not None
    return PointIndex(start, end, sides[0].covers(), sides[1].covers(), first.vocabularies)


class _SideCovers:
    """One side's covers, collected row by row."""

    def __init__(self) -> None:
        self.position, self.point, self.place = list[int](), list[int](), list[int]()
        self.bounds: list[IntArray] = []

    def add(
        self, covers: Sequence[Cover], places: Sequence[int], at: Mapping[int, int], first: int
    ) -> None:
        """Add the covers of a row.

        Args:
            covers: Its covers.
            places: Tokens before each of its points.
            at: Map from a token's index in the response to its loss position.
            first: Number of its first point.
        """
        self.position += [at[cover.token] for cover in covers]
        self.point += [cover.point + first for cover in covers]
        self.bounds += [cover.bounds for cover in covers]
        self.place += [at[place] if place in at else at[place - 1] + 1 for place in places]

    def covers(self) -> Covers:
        """Return them as tensors."""
        bounds = np.stack(self.bounds) if self.bounds else np.empty((0, 2), dtype=np.int64)
        return Covers(
            _ints(self.position),
            _ints(self.point),
            torch.from_numpy(bounds),
            _ints(self.place),
        )


def _ints(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


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
    has_own = any(row.teacher_prompt_ids or row.aligned is not None for row in rows)
    read = [row.teacher_row for row in rows] if has_own else rows
    if has_own:
        teacher = _padded(read, pad_id)
    images, teacher_images = (
        tuple(row.images for row in side) if any(row.images for row in side) else ()
        for side in (rows, read)
    )
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
        images=images,
        teacher_images=teacher_images,
    )


def micro_batches(rows: Sequence[TrainingRow], num_batches: int) -> list[DistillBatch]:
    """Cut one rank's rows of an optimizer step into micro-batches of similar lengths.

    Always returns ``num_batches``, so that all ranks do the same number of passes. If there are too
    few rows, the last batches are one fully masked row each, which contributes zero.

    Args:
        rows: At least one row.
        num_batches: Micro-batches per optimizer step.
    """
    by_length = sorted(rows, key=lambda row: -row.num_tokens)
    size = -(-len(rows) // num_batches)
    batches = [collate(by_length[i : i + size]) for i in range(0, len(rows), size)]
    while len(batches) < num_batches:
        batches.append(collate([fully_masked(by_length[-1])]))
    return batches
