"""Dataset rows in the ids of another tokenizer, aligned once and kept for later epochs.

Dataset rows, and so their alignments, are the same in every epoch. Kept rows are bounded in memory:
once the limit is reached, further rows are aligned each time. No stored row is replaced: an epoch
reads every row once, in a new order, and a store that replaced its oldest rows would find none of
them again.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import TypeAlias

from okd_lightning.models.retokenization import Retokenizer
from okd_lightning.records.batches import TrainingRow
from okd_lightning.records.chunks import AlignedResponse

MOST_BYTES = 256 * 2**20
"""Memory of kept rows."""

_OF_PLACE, _OF_ID, _OF_SPAN, _OF_COVER = 8, 36, 160, 80
"""Bytes of a tuple's entry, of one with its own integer, of a Span, of a Cover without bounds."""

_Key: TypeAlias = tuple[object, ...]


class AlignedRows:
    """Read rows by a retokenizer, dataset rows once.

    Args:
        retokenizer: Aligns a row.
        most_bytes: Memory of kept rows.

    Attributes:
        num_bytes: Memory of the rows that are kept, estimated.
    """

    def __init__(self, retokenizer: Retokenizer, most_bytes: int = MOST_BYTES) -> None:
        self._retokenizer = retokenizer
        self._most_bytes = most_bytes
        self._kept: dict[_Key, TrainingRow] = {}
        self._counted: set[int] = set()  # bounds are shared by rows: each array counts once
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def read(self, rows: Sequence[TrainingRow], end_ids: Collection[int]) -> list[TrainingRow]:
        """Return rows with their response as the teacher reads it; see ``Retokenizer.row``."""
        return [self._row(row, end_ids) for row in rows]

    def _row(self, row: TrainingRow, end_ids: Collection[int]) -> TrainingRow:
        if row.source != "dataset":  # a sample is read once
            return self._retokenizer.row(row, end_ids)
        key = row.input_ids, row.mask, row.prompt_length, row.teacher_prompt_ids, tuple(end_ids)
        kept = self._kept.get(key)
        if kept is not None:
            return replace(
                row,
                teacher_prompt_ids=kept.teacher_prompt_ids,
                aligned=kept.aligned,
                mask=kept.mask,
            )
        found = self._retokenizer.row(row, end_ids)
        assert found.aligned is not None
        ids = 2 * len(row.input_ids) + len(row.mask) + 2 * len(row.teacher_prompt_ids)
        size, arrays = self._size(found.aligned)
        size += _OF_PLACE * ids
        if self.num_bytes + size <= self._most_bytes:
            self._kept[key] = found
            self._counted |= arrays
            self.num_bytes += size
        return found

    def _size(self, response: AlignedResponse) -> tuple[int, set[int]]:
        """Return the memory that a response adds, and the arrays that it counts."""
        size = _OF_ID * len(response.teacher_ids) + _OF_SPAN * len(response.spans)
        if response.points is None:
            return size, set()
        covers = response.points.student + response.points.teacher
        arrays = {id(cover.bounds): cover.bounds.nbytes for cover in covers}
        new = arrays.keys() - self._counted
        places = len(response.points.places) + len(response.points.chunks)
        size += _OF_COVER * (len(covers) + places) + sum(arrays[one] + _OF_COVER for one in new)
        return size, new
