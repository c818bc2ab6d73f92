"""Dataset rows that are aligned with another tokenizer once.

Frozen here: a kept row equals one that is aligned again, for every loss; rows that differ in
prompt, mask or end ids are other rows; samples are not kept; memory is bounded, and with the limit
reached the rows kept so far are still found; the estimate of memory is that of the objects.
"""

from __future__ import annotations

import gc
import sys
import types
from dataclasses import replace

import numpy as np
import pytest
import tiny
from pair_tokenizers import merging

from okd_lightning.models.aligned_rows import AlignedRows
from okd_lightning.models.retokenization import Retokenizer
from okd_lightning.records.batches import TrainingRow
from okd_lightning.records.collation import collate

LOSSES = ["chunk", "text", "next_byte", "shared_tokens"]


def make(loss: str) -> Retokenizer:
    pairs = merging("ab", "cd", "bc")
    return Retokenizer(tiny.make_tokenizer(), pairs, 1, len(pairs), 99, loss)


def row(text: str, source: str = "dataset", **settings) -> TrainingRow:
    ids = tuple(tiny.make_tokenizer()("pp" + text)["input_ids"])
    mask = (False, False) + (True,) * (len(ids) - 2)
    return TrainingRow(0, source, ids, mask, 2, teacher_prompt_ids=(9,), **settings)


class Counting:
    """A retokenizer that counts its calls."""

    def __init__(self, loss: str) -> None:
        self.inner, self.calls = make(loss), 0

    def row(self, given, end_ids):
        self.calls += 1
        return self.inner.row(given, end_ids)


def content(batch) -> list:
    """Return all tensors of a batch."""
    points = batch.chunks.points
    found = [batch.input_ids, batch.mask, batch.teacher_input_ids, batch.teacher_mask]
    found += [batch.chunks.student, batch.chunks.teacher]
    if points is not None:
        found += [points.start, points.end]
        for side in (points.student, points.teacher):
            found += [side.position, side.point, side.bounds, side.place]
    return [tensor.tolist() for tensor in found]


@pytest.mark.parametrize("loss", LOSSES)
def test_a_kept_row_is_that_of_another_alignment(loss):
    counting = Counting(loss)
    rows = AlignedRows(counting)
    given = [row("abcdab"), row("bcd"), row("dddd")]
    first = rows.read(given, (1,))
    again = rows.read(given[::-1], (1,))[::-1]
    assert counting.calls == len(rows) == 3
    fresh = [make(loss).row(one, (1,)) for one in given]
    assert content(collate(first)) == content(collate(again)) == content(collate(fresh))
    other = replace(given[0], index=7, teacher=2)  # the rest of a row is its own
    (found,) = rows.read([other], (1,))
    assert (found.index, found.teacher, counting.calls) == (7, 2, 3)


def test_other_prompts_masks_and_ends_are_other_rows():
    counting = Counting("chunk")
    rows = AlignedRows(counting)
    one = row("abcd")
    others = [
        replace(one, mask=(False,) * len(one.mask)),
        replace(one, prompt_length=3, mask=(False,) * 3 + one.mask[3:]),
        replace(one, teacher_prompt_ids=(9, 9)),
    ]
    rows.read([one, *others], (1,))
    rows.read([one], (1, 2))
    assert counting.calls == len(rows) == 5


def test_samples_are_not_kept():
    counting = Counting("chunk")
    rows = AlignedRows(counting)
    for _ in range(2):
        rows.read([row("abcd", "student")], (1,))
    assert (counting.calls, len(rows), rows.num_bytes) == (2, 0, 0)


def test_memory_is_bounded_and_kept_rows_stay():
    counting = Counting("chunk")
    rows = AlignedRows(counting, most_bytes=20_000)
    given = [row("abcd" * 5 + letter * 9) for letter in "efghijklmn"]
    for _ in range(2):
        rows.read(given, (1,))
    assert 0 < len(rows) < 10
    assert rows.num_bytes <= 20_000
    assert counting.calls == 20 - len(rows)


def memory(thing: object, seen: set[int]) -> int:
    """Bytes of an object and all that it refers to, without what has been seen."""
    if id(thing) in seen or isinstance(thing, type | types.ModuleType | types.FunctionType):
        return 0
    seen.add(id(thing))
    own = thing.nbytes if isinstance(thing, np.ndarray) else 0
    parts = (memory(part, seen) for part in gc.get_referents(thing))
    return max(own, sys.getsizeof(thing)) + sum(parts)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_estimate_of_memory_is_that_of_the_objects(loss):
    rows = AlignedRows(make(loss))
    texts = ["".join("abcdefgh"[(i * j + j // 7) % 8] for j in range(200)) for i in range(30)]
    given = [row(text) for text in texts]
    first = rows.read([row("abcd")], (1,))  # with what is read once: vocabularies
    seen: set[int] = set()
    memory((first, given), seen)
    before = rows.num_bytes
    used = memory([one.aligned for one in rows.read(given, (1,))], seen)
    assert 0.5 < (rows.num_bytes - before) / used < 2, used
