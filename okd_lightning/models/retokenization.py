"""A response in the ids of another tokenizer: student ids, their bytes, teacher ids.

Owns the text contract of a pair with two tokenizers. The response crosses as bytes, each model has
its own end, and what does not survive is left without loss and counted:

* bytes that the teacher's tokenizer changes, characters that it lacks, invalid UTF-8, control ids;
* the last chunk of a response that was cut: the text after it could have changed its tokens;
* what follows the last sync point that fits into the teacher's context;
* sampled chunks that the student's tokenizer would write otherwise: every segmentation of a text
  gets the teacher's one probability, so that rare ones would be rewarded for being rare.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from okd_lightning.errors import DataError
from okd_lightning.models.text_ids import TextEncoder
from okd_lightning.models.token_bytes import TokenBytes
from okd_lightning.records.batches import TrainingRow
from okd_lightning.records.chunks import AlignedResponse, Piece, Span, aligned

LONGEST_CHUNK = 32
"""Most tokens of a chunk on either side; real pairs have 10 or 11 (GSM8K, TinyStories)."""


@dataclass(frozen=True)
class _Spelling:
    """One side's tokens of a response without its end.

    Attributes:
        ids: The tokens.
        pieces: Their bytes.
    """

    ids: Sequence[int]
    pieces: Sequence[Piece]


class _Side:
    """One model's tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, option: str) -> None:
        self.encoder = TextEncoder(tokenizer)
        self.bytes = TokenBytes(tokenizer, option)

    def spelling(self, ids: Sequence[int], opens: bool) -> _Spelling:
        """Return the bytes of ids.

        Args:
            ids: The tokens.
            opens: Whether they begin a text, whose first token has ``TokenBytes.opening``.
        """
        known = self.bytes.pieces
        pieces = [known[i] if i < len(known) else None for i in ids]
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


class Retokenizer:
    """Gives rows their response in the teacher's ids, and the chunks that both models share.

    Args:
        student: The student's tokenizer.
        teacher: The teacher's.
        num_teacher_ids: Ids that the teacher has a row for; a text that needs others is not read.
        teacher_end: Id that ends a response of the teacher; None if it has none.
        max_teacher_tokens: Tokens of prompt and response that the teacher reads; None for any.

    Raises:
        VocabularyError: A tokenizer whose tokens cannot be read as bytes.
    """

    def __init__(
        self,
        student: PreTrainedTokenizerBase,
        teacher: PreTrainedTokenizerBase,
        teacher_end: int | None,
        num_teacher_ids: int,
        max_teacher_tokens: int | None,
    ) -> None:
        self._student = _Side(student, "--model.student")
        self._teacher = _Side(teacher, "--model.teacher")
        self._teacher_end = teacher_end
        self._num_teacher_ids = num_teacher_ids
        self._room = max_teacher_tokens

    def row(self, row: TrainingRow, end_ids: Collection[int]) -> TrainingRow:
        """Return a row with its response as the teacher reads it.

        A dataset row keeps loss on the tokens within chunks alone; in a sampled row the others keep
        their mask, because they count in its divisor, and have no chunk.

        Args:
            row: A row with the teacher's own prompt.
            end_ids: Ids that end a response of the student.
        """
        start = row.prompt_length
        prompt = (
            row.teacher_prompt_ids if self._room is None else (row.teacher_prompt_ids[: self._room])
        )
        opens = not any(self._student.spelling(row.input_ids[:start], False).pieces)
        found = self._align(row.input_ids[start:], end_ids, opens)
        room = None if self._room is None else self._room - len(prompt)
        own = row.mask[start:]
        kept = [
            span
            for span in found.spans
            if all(own[slice(*span.student)])
            and (start or span.student[0])
            and (prompt or span.teacher[0])
            and (room is None or span.teacher[1] <= room)
            and max(_length(span.student), _length(span.teacher)) <= LONGEST_CHUNK
        ]
        canonical = kept
        if row.source == "student":
            has_end = row.input_ids[-1] in end_ids
            canonical = self._canonical(row.input_ids[start:], kept, has_end, opens)
        num_kept, num_canonical = (
            sum(_length(span.student) for span in spans) for spans in (kept, canonical)
        )
        response = AlignedResponse(
            teacher_ids=found.teacher_ids[:room],
            spans=tuple(canonical),
            num_unaligned=row.num_loss_tokens - num_kept,
            num_noncanonical=num_kept - num_canonical,
        )
        mask = row.mask
        if row.source != "student":
            inside = {place for s in canonical for place in range(*s.student)}
            mask = (False,) * start + tuple(i in inside for i in range(len(own)))
        return replace(row, teacher_prompt_ids=prompt, aligned=response, mask=mask)

    def _align(self, ids: Sequence[int], end_ids: Collection[int], opens: bool) -> AlignedResponse:
        """Return all chunks of a response, before any is left out."""
        has_end = bool(ids) and ids[-1] in end_ids
        own = self._student.spelling(ids[: len(ids) - has_end], opens)
        other = self._teacher.encode(_text(own.pieces), opens) if own.ids else _Spelling((), ())
        if other is None or any(i >= self._num_teacher_ids for i in other.ids):
            return AlignedResponse()
        spans = aligned(own.pieces, other.pieces)
        if not has_end:
            is_last = bool(spans) and spans[-1].student[1] == len(own.ids)
            return AlignedResponse(tuple(other.ids), tuple(spans[: len(spans) - is_last]))
        if self._teacher_end is None:
            return AlignedResponse(tuple(other.ids), tuple(spans))
        num, num_other = len(own.ids), len(other.ids)
        end = Span((num, num + 1), (num_other, num_other + 1))
        return AlignedResponse((*other.ids, self._teacher_end), (*spans, end))

    def _canonical(
        self, ids: Sequence[int], spans: Sequence[Span], has_end: bool, opens: bool
    ) -> list[Span]:
        """Return the chunks whose student ids are the tokenizer's own for the response's text."""
        own = self._student.spelling(ids[: len(ids) - has_end], opens)
        usual = self._student.encode(_text(own.pieces), opens)
        if usual is None:
            return []
        same = {
            span.student[0]
            for span in aligned(own.pieces, usual.pieces)
            if span.is_one_to_one and own.ids[span.student[0]] == usual.ids[span.teacher[0]]
        }
        if has_end:  # its chunk has no other segmentation
            same.add(len(own.ids))
        return [s for s in spans if same.issuperset(range(*s.student))]


def _text(pieces: Sequence[Piece]) -> str:
    """Return the text of tokens, with U+FFFD for invalid UTF-8 and nothing for control ids."""
    return b"".join(piece or b"" for piece in pieces).decode(errors="replace")


def _length(span: tuple[int, int]) -> int:
    return span[1] - span[0]
