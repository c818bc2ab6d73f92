"""Collation of ragged rows into the padded tensors of one micro-batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from okd_lightning.records.batches import SOURCES, DistillBatch, TrainingRow
from okd_lightning.records.chunks import (
    AlignedResponse,
    Chunks,
    Cover,
    Covers,
    IntArray,
    PointIndex,
)

_Response: TypeAlias = tuple[AlignedResponse, Mapping[int, int], Mapping[int, int]]
"""A response, and from places of both sides' tokens to their loss positions."""


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
        """Add a row's.

        Args:
            covers: Its covers.
            places: Tokens before each of its points.
            at: From a token's place in the response to its loss position.
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
