"""One response under two tokenizers: sync points, and the chunks between them.

Both models' tokens encode the same bytes. A position where both have a token end is a *sync point*,
and a *chunk* lies between two neighbouring ones: the smallest unit with a probability under both
models. Where the bytes differ (a character that one tokenizer lacks or normalises, a control id)
there is no chunk. Owns the alignment and its records; it knows no tokenizer.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Piece: TypeAlias = bytes | None
"""Bytes of a token; None for a token without text."""

IntArray: TypeAlias = npt.NDArray[np.int64]
"""Integers on the host."""

_WINDOW = 8
"""Number of equal bytes (or the whole rest) after which two differing texts are aligned again."""

_REACH = 64
"""Most bytes of both texts together that the realignment may skip."""

_NO_TEXT = (256, 257)
"""Symbols of a token without text, student's and teacher's: equal to nothing."""


@dataclass(frozen=True, slots=True)
class Span:
    """A chunk of one response, in places of the response's tokens.

    Attributes:
        student: First of the student's tokens, and the one after the last.
        teacher: The same of the teacher's tokens.
    """

    student: tuple[int, int]
    teacher: tuple[int, int]

    @property
    def is_one_to_one(self) -> bool:
        """True for a span of one token on each side."""
        return self.student[1] - self.student[0] == 1 == self.teacher[1] - self.teacher[0]


def aligned(student: Sequence[Piece], teacher: Sequence[Piece]) -> list[Span]:
    """Return the chunks of a response: spans of equal bytes between neighbouring sync points.

    A token of no bytes belongs to the chunk before it, at the beginning to the first one.

    Args:
        student: Bytes of the student's tokens.
        teacher: Bytes of the teacher's tokens.
    """
    own, own_ends = _symbols(student, _NO_TEXT[0])
    other, other_ends = _symbols(teacher, _NO_TEXT[1])
    places = {0, len(own)}, {0, len(other)}
    points = [(0, 0)]
    for start, other_start, length in _equal_runs(own, other):
        for place in range(length + 1):
            point = start + place, other_start + place
            if _ends(point[0], own_ends, places[0]) and _ends(point[1], other_ends, places[1]):
                points.append(point)
    points.append((len(own), len(other)))
    found = []
    for (a, b), (c, d) in itertools.pairwise(points):
        if a < c and own[a:c] == other[b:d]:
            student_start = own_ends[a] if a else 0
            teacher_start = other_ends[b] if b else 0
            found.append(Span((student_start, own_ends[c]), (teacher_start, other_ends[d])))
    return found


def _ends(place: int, ends: dict[int, int], outer: set[int]) -> bool:
    return place in ends or place in outer


def _symbols(pieces: Sequence[Piece], no_text: int) -> tuple[list[int], dict[int, int]]:
    """Return all bytes, and from each place where a token ends to the number of tokens so far."""
    symbols: list[int] = []
    ends: dict[int, int] = {}
    for number, piece in enumerate(pieces, start=1):
        symbols += [no_text] if piece is None else piece
        ends[len(symbols)] = number
    return symbols, ends


def _equal_runs(one: list[int], other: list[int]) -> list[tuple[int, int, int]]:
    """Return runs of equal symbols, in order: place in one, place in the other, length."""
    if one == other:
        return [(0, 0, len(one))]
    runs, i, j = [], 0, 0
    while i < len(one) and j < len(other):
        length = 0
        while (
            i + length < len(one)
            and j + length < len(other)
            and one[i + length] == other[j + length]
        ):
            length += 1
        if length:
            runs.append((i, j, length))
        i, j = i + length, j + length
        skip = _skip(one[i : i + _REACH + _WINDOW], other[j : j + _REACH + _WINDOW])
        if skip is None:
            break
        i, j = i + skip[0], j + skip[1]
    return runs


def _skip(one: list[int], other: list[int]) -> tuple[int, int] | None:
    """Return the fewest symbols of both to skip, after which they are equal; None for none."""
    for total in range(1, _REACH + 1):
        for i in range(total + 1):
            j = total - i
            length = min(_WINDOW, len(one) - i, len(other) - j)
            if length > 0 and one[i : i + length] == other[j : j + length]:
                return i, j
    return None


@dataclass(frozen=True, eq=False, slots=True)
class Cover:
    """Segmentation of a response up to a sync point; its last token reaches or passes the point.

    Attributes:
        token: Index of that token in the response; the tokens before it are the response's own.
        point: The sync point.
        bounds: Places in the vocabulary sorted by bytes: the tokens that reach or pass the point
            are between the first and the last.
    """

    token: int
    point: int
    bounds: IntArray


@dataclass(frozen=True)
class SortedVocabularies:
    """Both sides' ids with text, sorted by their bytes.

    Attributes:
        student: [ids] the student's.
        teacher: [ids] the teacher's.
        alphabet: [bytes] bytes that occur in tokens of both.
    """

    student: Tensor
    teacher: Tensor
    alphabet: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> SortedVocabularies:
        """Return them on another device."""
        moved = {name: t.to(device, non_blocking=non_blocking) for name, t in vars(self).items()}
        return SortedVocabularies(**moved)


@dataclass(frozen=True)
class SharedIds:
    """One side's ids whose bytes are a token on the other side too.

    Attributes:
        ids: [ids] the ids.
        cells: [ids] number of each id's bytes, the same on both sides; several ids may have one.
        num: Number of different bytes.
    """

    ids: Tensor
    cells: Tensor
    num: int

    def to(self, device: torch.device | str, non_blocking: bool = False) -> SharedIds:
        """Return them on another device."""
        ids, cells = (t.to(device, non_blocking=non_blocking) for t in (self.ids, self.cells))
        return SharedIds(ids, cells, self.num)


@dataclass(frozen=True)
class SyncPoints:
    """The sync points of a response's chunks, and the covers of its text up to each of them.

    Attributes:
        vocabularies: The sorted vocabularies that the covers' bounds index.
        chunks: First and last sync point of each chunk.
        places: Tokens of the student, and of the teacher, before each sync point.
        student: Covers by the student's tokens.
        teacher: Covers by the teacher's.
    """

    vocabularies: SortedVocabularies
    chunks: tuple[tuple[int, int], ...] = ()
    places: tuple[tuple[int, int], ...] = ()
    student: tuple[Cover, ...] = ()
    teacher: tuple[Cover, ...] = ()


@dataclass(frozen=True)
class AlignedResponse:
    """A row's response as the teacher's tokens, with its chunks.

    Attributes:
        teacher_ids: The response in the teacher's ids, with the teacher's own end.
        spans: Chunks that carry loss, in order.
        num_unaligned: Student's loss tokens without a chunk: other bytes on the teacher's side, the
            end of a response that was cut, tokens beyond the teacher's context.
        num_noncanonical: Student's loss tokens in chunks that its tokenizer would segment
            differently.
        points: For losses between distributions over texts; None for others.
        shared: The student's and the teacher's shared ids, for the loss between these; None for
            others.
    """

    teacher_ids: tuple[int, ...] = ()
    spans: tuple[Span, ...] = ()
    num_unaligned: int = 0
    num_noncanonical: int = 0
    points: SyncPoints | None = None
    shared: tuple[SharedIds, SharedIds] | None = None

    def without_chunks(self) -> AlignedResponse:
        """Return the response as that of a fully masked row."""
        points = None if self.points is None else SyncPoints(self.points.vocabularies)
        return AlignedResponse(self.teacher_ids, points=points, shared=self.shared)

    @property
    def longest(self) -> int:
        """Tokens of the longest chunk, on the side where it has more; 0 without any."""
        sides = (one for span in self.spans for one in (span.student, span.teacher))
        return max((end - start for start, end in sides), default=0)

    @property
    def num_one_to_one(self) -> int:
        """Student's loss tokens that are one token of the teacher."""
        return sum(span.is_one_to_one for span in self.spans)


@dataclass(frozen=True)
class Covers:
    """One side's covers of a micro-batch; see ``Cover``.

    Attributes:
        position: [covers] loss position that predicts the token.
        point: [covers] sync point, numbered over all rows.
        bounds: [covers, 2 or 258] places in the vocabulary sorted by bytes.
        place: [points] loss position after each sync point; one after the last at a row's end.
    """

    position: Tensor
    point: Tensor
    bounds: Tensor
    place: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Covers:
        """Return the covers on another device."""
        moved = {name: t.to(device, non_blocking=non_blocking) for name, t in vars(self).items()}
        return Covers(**moved)


@dataclass(frozen=True)
class PointIndex:
    """The sync points of a micro-batch.

    Attributes:
        start: [chunks] sync point before each chunk.
        end: [chunks] sync point after it.
        student: The student's covers.
        teacher: The teacher's.
        vocabularies: The sorted vocabularies that their bounds index.
    """

    start: Tensor
    end: Tensor
    student: Covers
    teacher: Covers
    vocabularies: SortedVocabularies

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PointIndex:
        """Return the points on another device."""
        start, end = (t.to(device, non_blocking=non_blocking) for t in (self.start, self.end))
        student, teacher = (side.to(device, non_blocking) for side in (self.student, self.teacher))
        vocabularies = self.vocabularies.to(device, non_blocking)
        return PointIndex(start, end, student, teacher, vocabularies)


@dataclass(frozen=True)
class Chunks:
    """The chunks of a micro-batch.

    Attributes:
        student: [positions] chunk of each loss token of the student, from 0; -1 for none.
        teacher: [teacher positions] chunk of each loss token of the teacher.
        num: Number of chunks.
        points: For losses between distributions over texts; None for others.
        shared: The student's and the teacher's shared ids, for the loss between these; None for
            others.
    """

    student: Tensor
    teacher: Tensor
    num: int
    points: PointIndex | None = None
    shared: tuple[SharedIds, SharedIds] | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Chunks:
        """Return the chunks on another device."""
        student, teacher = (
            index.to(device, non_blocking=non_blocking) for index in (self.student, self.teacher)
        )
        points = None if self.points is None else self.points.to(device, non_blocking)
        if self.shared is None:
            return Chunks(student, teacher, self.num, points)
        own, other = (side.to(device, non_blocking) for side in self.shared)
        return Chunks(student, teacher, self.num, points, (own, other))

    def sums(self, values: Tensor, index: Tensor) -> Tensor:
        """[positions] → [chunks]: the sum over each chunk's tokens, with gradient.

        Args:
            values: One number per position.
            index: ``student`` or ``teacher``.
        """
        inside = index >= 0
        return values.new_zeros(self.num).index_add(0, index[inside], values[inside])

    @property
    def first(self) -> Tensor:
        """[chunks] the position of each chunk's first student token."""
        return self._first(self.student)

    @property
    def first_of_teacher(self) -> Tensor:
        """[chunks] the position of each chunk's first teacher token."""
        return self._first(self.teacher)

    def _first(self, index: Tensor) -> Tensor:
        places = torch.arange(len(index), device=index.device)
        inside = index >= 0
        first = places.new_full((self.num,), len(index))
        return first.scatter_reduce(0, index[inside], places[inside], "amin")
