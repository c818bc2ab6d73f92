"""A response in the ids of another tokenizer: student ids, their bytes, teacher ids.

Owns the text contract of a pair with two tokenizers. The response is transferred as bytes, and each
model has its own end token. The parts that cannot be transferred get no loss and are counted:

* bytes that the teacher's tokenizer changes, characters that it lacks, invalid UTF-8, control ids;
* the last chunk of a response that was cut: the text after it could have changed its tokens;
* the text after the last sync point that fits into the teacher's context;
* sampled chunks that the student's tokenizer would segment differently: the teacher gives every
  segmentation of a text the same probability, so that rare ones would be rewarded for being rare.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, TypeAlias

import torch
from transformers import PreTrainedTokenizerBase

from okd_lightning.errors import DataError
from okd_lightning.models.byte_ranges import ByteRanges
from okd_lightning.models.text_ids import TextEncoder
from okd_lightning.models.token_bytes import TokenBytes
from okd_lightning.records.batches import TrainingRow
from okd_lightning.records.chunks import (
    AlignedResponse,
    Cover,
    Piece,
    SharedIds,
    SortedVocabularies,
    Span,
    SyncPoints,
    aligned,
)

TextLoss: TypeAlias = Literal["chunk", "text", "next_byte", "shared_tokens"]
"""Loss between two texts; see ForeignTeacher."""

LONGEST_CHUNK = 32
"""Most tokens of a chunk on either side; common pairs reach 10 or 11 (GSM8K, TinyStories)."""


@dataclass(frozen=True)
class _Spelling:
    """One side's tokens of a response without its end.

    Attributes:
        ids: The tokens.
        pieces: Their bytes.
    """

    ids: Sequence[int] = ()
    pieces: Sequence[Piece] = ()


@dataclass(frozen=True)
class _Pair:
    """A response on both sides.

    Attributes:
        student: The student's tokens.
        teacher: The teacher's.
        has_end: Whether the student's response has its end.
        opens: Whether it begins a text.
    """

    student: _Spelling
    teacher: _Spelling
    has_end: bool
    opens: bool


class _Side:
    """One model's tokenizer."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, option: str, num_ids: int | None = None
    ) -> None:
        self.encoder = TextEncoder(tokenizer)
        self.bytes = TokenBytes(tokenizer, option)
        self.pieces = self.bytes.pieces[:num_ids]

    @cached_property
    def ranges(self) -> ByteRanges:
        """The vocabulary sorted by bytes."""
        return ByteRanges(self.pieces)

    def spelling(self, ids: Sequence[int], opens: bool) -> _Spelling:
        """Return the bytes of ids.

        Args:
            ids: The tokens.
            opens: Whether they begin a text, whose first token has ``TokenBytes.opening``.
        """
        pieces = [self.pieces[i] if i < len(self.pieces) else None for i in ids]
        if opens and pieces and pieces[0] is not None:
            pieces[0] = pieces[0].removeprefix(self.bytes.opening)
        return _Spelling(ids, pieces)

    def encode(self, text: str, opens: bool) -> _Spelling | None:
        """Return a text's tokens; None if the tokenizer cannot encode it."""
        try:
            (ids,) = self.encoder.plain([text]) if opens else self.encoder.middles([text])
        except DataError:
            return None
        return self.spelling(ids, opens)

    def covers(
        self,
        pieces: Sequence[Piece],
        run: range,
        points: Sequence[tuple[int, int]],
        opens: bool,
        by_byte: bool,
    ) -> Iterator[Cover]:
        """Yield the covers of a run of chunks.

        Args:
            pieces: Bytes of the response's tokens.
            run: The tokens from which covers may begin.
            points: Sync points of the run: tokens before each, ascending, and its number.
            opens: See ``spelling``.
            by_byte: Whether the bounds are those by next byte, also for the tokens that begin at a
                point.
        """
        later = list(points)
        for token in run:
            while later and later[0][0] < token + (not by_byte):
                later.pop(0)
            prefix = self.bytes.opening if opens and token == 0 else b""
            place = token
            for end, point in later:
                prefix += b"".join(piece or b"" for piece in pieces[place:end])
                place = end
                bounds = self.ranges.splits(prefix) if by_byte else self.ranges.bounds(prefix)
                if bounds[0] == bounds[-1]:  # nor does a token begin with more of the text
                    break
                yield Cover(token, point, bounds)


class Retokenizer:
    """Gives rows their response in the teacher's ids, and the chunks that both models share.

    Args:
        student: The student's tokenizer.
        teacher: The teacher's.
        teacher_end: Id that ends a response of the teacher; None if it has none.
        num_teacher_ids: Ids that the teacher has a row for; a text that needs others is not read.
        max_teacher_tokens: Tokens of prompt and response that the teacher reads; None for any. A
            function is called at the first row, so that a server is queried only when needed.
        loss: The loss that reads the rows; see ForeignTeacher.

    Raises:
        VocabularyError: A tokenizer whose tokens cannot be read as bytes.
    """

    def __init__(
        self,
        student: PreTrainedTokenizerBase,
        teacher: PreTrainedTokenizerBase,
        teacher_end: int | None,
        num_teacher_ids: int,
        max_teacher_tokens: int | Callable[[], int | None] | None,
        loss: TextLoss = "chunk",
    ) -> None:
        self._student = _Side(student, "--model.student")
        self._teacher = _Side(teacher, "--model.teacher", num_teacher_ids)
        self._teacher_end = teacher_end
        self._num_teacher_ids = num_teacher_ids
        self._max_teacher_tokens = max_teacher_tokens
        self._loss = loss

    @cached_property
    def _room(self) -> int | None:
        most = self._max_teacher_tokens
        return most() if callable(most) else most

    @cached_property
    def _vocabularies(self) -> SortedVocabularies:
        own, other = self._student.ranges, self._teacher.ranges
        alphabet = sorted(own.alphabet & other.alphabet)
        return SortedVocabularies(*map(torch.tensor, (own.order, other.order, alphabet)))

    @cached_property
    def _shared(self) -> tuple[SharedIds, SharedIds]:
        own, other = self._student.pieces, self._teacher.pieces
        shared = sorted({piece for piece in own if piece} & {piece for piece in other if piece})
        cell = {piece: number for number, piece in enumerate(shared)}
        found = []
        for pieces in (own, other):
            pairs = [(i, cell[piece]) for i, piece in enumerate(pieces) if piece in cell]
            ids, cells = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).unbind(-1)
            found.append(SharedIds(ids, cells, len(shared)))
        return found[0], found[1]

    def row(self, row: TrainingRow, end_ids: Collection[int]) -> TrainingRow:
        """Return a row with its response as the teacher reads it.

        A dataset row keeps loss on the tokens within chunks alone; in a sampled row the others keep
        their mask, because they count in its divisor, and have no chunk.

        Args:
            row: A row with the teacher's own prompt.
            end_ids: Ids that end a response of the student.
        """
        start = row.prompt_length
        prompt = row.teacher_prompt_ids
        if self._room is not None:
            prompt = prompt[: self._room]
        pair = self._pair(row, end_ids)
        spans, teacher_ids = self._spans(pair)
        room = None if self._room is None else self._room - len(prompt)
        own = row.mask[start:]
        kept = [
            span
            for span in spans
            if all(own[slice(*span.student)])
            and (start or span.student[0])
            and (prompt or span.teacher[0])
            and (room is None or span.teacher[1] <= room)
            and max(_length(span.student), _length(span.teacher)) <= LONGEST_CHUNK
        ]
        canonical = self._canonical(pair, kept) if row.source == "student" else kept
        num_kept, num_canonical = (
            sum(_length(span.student) for span in spans) for spans in (kept, canonical)
        )
        response = AlignedResponse(
            teacher_ids=teacher_ids[:room],
            spans=tuple(canonical),
            num_unaligned=row.num_loss_tokens - num_kept,
            num_noncanonical=num_kept - num_canonical,
            points=self._points(pair, canonical) if self._loss in ("text", "next_byte") else None,
            shared=self._shared if self._loss == "shared_tokens" else None,
        )
        mask = row.mask
        if row.source != "student":
            inside = {place for s in canonical for place in range(*s.student)}
            mask = (False,) * start + tuple(i in inside for i in range(len(own)))
        return replace(row, teacher_prompt_ids=prompt, aligned=response, mask=mask)

    def _pair(self, row: TrainingRow, end_ids: Collection[int]) -> _Pair:
        prompt, ids = row.input_ids[: row.prompt_length], row.input_ids[row.prompt_length :]
        opens = not any(self._student.spelling(prompt, False).pieces)
        has_end = bool(ids) and ids[-1] in end_ids
        own = self._student.spelling(ids[: len(ids) - has_end], opens)
        other = self._teacher.encode(_text(own.pieces), opens) if own.ids else _Spelling()
        if other is None or any(i >= self._num_teacher_ids for i in other.ids):
            return _Pair(_Spelling(), _Spelling(), False, opens)
        return _Pair(own, other, has_end, opens)

    def _spans(self, pair: _Pair) -> tuple[list[Span], tuple[int, ...]]:
        """Return all chunks of a response, before any is left out, and the teacher's ids."""
        own, other = pair.student, pair.teacher
        spans = aligned(own.pieces, other.pieces)
        if not pair.has_end:
            is_last = bool(spans) and spans[-1].student[1] == len(own.ids)
            return spans[: len(spans) - is_last], tuple(other.ids)
        if self._teacher_end is None:
            return spans, tuple(other.ids)
        num, num_other = len(own.ids), len(other.ids)
        end = Span((num, num + 1), (num_other, num_other + 1))
        return [*spans, end], (*other.ids, self._teacher_end)

    def _canonical(self, pair: _Pair, spans: Sequence[Span]) -> list[Span]:
        """Return the chunks whose student ids are the tokenizer's own for the response's text."""
        own = pair.student
        usual = self._student.encode(_text(own.pieces), pair.opens)
        if usual is None:
            return []
        same = {
            span.student[0]
            for span in aligned(own.pieces, usual.pieces)
            if span.is_one_to_one and own.ids[span.student[0]] == usual.ids[span.teacher[0]]
        }
        if pair.has_end:  # its chunk has no other segmentation
            same.add(len(own.ids))
        return [s for s in spans if same.issuperset(range(*s.student))]

    def _points(self, pair: _Pair, spans: Sequence[Span]) -> SyncPoints:
        """Return the sync points of chunks, with covers that reach back to the last gap."""
        chunks, places = list[tuple[int, int]](), list[tuple[int, int]]()
        firsts = list[tuple[int, int]]()  # of each point: where its run of chunks begins
        for span in spans:
            start = span.student[0], span.teacher[0]
            if not places or places[-1] != start:
                places.append(start)
                firsts.append(start)
            places.append((span.student[1], span.teacher[1]))
            firsts.append(firsts[-1])
            chunks.append((len(places) - 2, len(places) - 1))
        by_byte = self._loss == "next_byte"
        wanted = {start for start, _ in chunks} if by_byte else set(range(len(places)))
        covers: tuple[list[Cover], list[Cover]] = ([], [])
        sides = ((self._student, pair.student), (self._teacher, pair.teacher))
        for number, (side, tokens) in enumerate(sides):
            for first in dict.fromkeys(firsts):
                of_run = [
                    (place[number], point)
                    for point, place in enumerate(places)
                    if firsts[point] == first
                    and point in wanted
                    and place[number] <= len(tokens.ids)
                ]
                if of_run:
                    run = range(first[number], of_run[-1][0] + by_byte)
                    found = side.covers(tokens.pieces, run, of_run, pair.opens, by_byte)
                    covers[number].extend(found)
        own, other = map(tuple, covers)
        return SyncPoints(self._vocabularies, tuple(chunks), tuple(places), own, other)


def _text(pieces: Sequence[Piece]) -> str:
    """Return the text of tokens, with U+FFFD for invalid UTF-8 and nothing for control ids."""
    return b"".join(piece or b"" for piece in pieces).decode(errors="replace")


def _length(span: tuple[int, int]) -> int:
    return span[1] - span[0]
