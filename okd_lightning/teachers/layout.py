"""Layout of a cache: its distinct rows, by the sequence that the teacher reads, and their files.

Deterministic: the same examples give the same layout on every rank and in every run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

import numpy as np

from okd_lightning.records.batches import Example, TrainingRow
from okd_lightning.records.collation import dataset_row

PART_POSITIONS = 2**15
"""Approximate loss tokens per file: the work that is lost if the writing process is killed."""


@dataclass(frozen=True)
class Place:
    """Place of a row's records.

    Attributes:
        part: Number of the file.
        start: First record in the file.
        count: Number of records.
    """

    part: int
    start: int
    count: int


@dataclass(frozen=True)
class Part:
    """The rows of one file, longest first.

    Attributes:
        rows: The rows with the teacher's prompts.
        num_positions: Loss tokens of all rows.
    """

    rows: tuple[TrainingRow, ...]
    num_positions: int


@dataclass(frozen=True)
class Layout:
    """The distinct rows of a dataset in the files of its cache.

    Attributes:
        parts: The files.
        places: Place of each row, by ``reading_key``.
        digest: Digest of all reading keys in order.
    """

    parts: tuple[Part, ...]
    places: dict[bytes, Place]
    digest: str

    @property
    def num_positions(self) -> int:
        """Loss tokens of all rows."""
        return sum(part.num_positions for part in self.parts)


def reading_key(ids: Any, mask: Any) -> bytes:
    """Return the key of a sequence: a hash of its ids and its loss mask.

    Args:
        ids: [seq] ids that the teacher reads, without padding.
        mask: [seq] True on loss tokens.
    """
    text = np.asarray(ids, dtype="<i4").tobytes()
    return blake2b(text + np.asarray(mask, dtype=bool).tobytes(), digest_size=16).digest()


def layout_of(examples: Sequence[Example], part_positions: int) -> Layout:
    """Return the layout of a dataset's responses; rows without loss are left out.

    Args:
        examples: The tokenized dataset.
        part_positions: Approximate loss tokens per file.
    """
    rows: dict[bytes, TrainingRow] = {}
    for example in examples:
        row = replace(dataset_row(example).teacher_row, teacher_prompt_ids=())
        if row.num_loss_tokens:
            rows.setdefault(reading_key(row.input_ids, row.mask), row)
    digest = blake2b(b"".join(rows), digest_size=32).hexdigest()
    parts: list[Part] = []
    places: dict[bytes, Place] = {}
    for chunk in _chunks(rows, part_positions):
        start = 0
        chunk.sort(key=lambda item: -len(item[1].input_ids))
        for key, row in chunk:
            places[key] = Place(len(parts), start, row.num_loss_tokens)
            start += row.num_loss_tokens
        parts.append(Part(tuple(row for _, row in chunk), start))
    return Layout(tuple(parts), places, digest)


def _chunks(
    rows: dict[bytes, TrainingRow], part_positions: int
) -> list[list[tuple[bytes, TrainingRow]]]:
    chunks: list[list[tuple[bytes, TrainingRow]]] = []
    size = part_positions
    for item in rows.items():
        if size >= part_positions:
            chunks.append([])
            size = 0
        chunks[-1].append(item)
        size += item[1].num_loss_tokens
    return chunks
