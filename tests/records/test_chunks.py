"""Alignment of one response under two tokenizers.

Frozen here: chunks lie between neighbouring positions where both have a token end; bytes that
differ have no chunk, and what follows is aligned again; tokens without text match nothing; tokens
of no bytes belong to the chunk before them; sums over chunks keep the gradient.
"""

from __future__ import annotations

import random

import pytest
import torch

from okd_lightning.records.batches import TrainingRow
from okd_lightning.records.chunks import AlignedResponse, Chunks, Span, aligned
from okd_lightning.records.collation import collate, fully_masked
from okd_lightning.records.counts import count_chunks


def pieces(text: str) -> list[bytes]:
    return [piece.encode() for piece in text.split("|")]


def spans(student, teacher):
    return [(span.student, span.teacher) for span in aligned(student, teacher)]


def test_chunks_lie_between_sync_points():
    found = spans(pieces("Once| up|on| a| time"), pieces("On|ce| upon| a| t|ime"))
    assert found == [((0, 1), (0, 2)), ((1, 3), (2, 3)), ((3, 4), (3, 4)), ((4, 5), (4, 6))]


def test_sync_points_may_lie_within_a_character():
    e = "é".encode()
    assert spans([b"a", e[:1], e[1:]], [b"a", e[:1], e[1:] + b"b"]) == [
        ((0, 1), (0, 1)),
        ((1, 2), (1, 2)),
    ]


def test_a_character_that_the_teacher_lacks_has_no_chunk():
    found = spans([b"Lily", b"\n", b"went"], [b"L", b"ily", None, b"went"])
    assert found == [((0, 1), (0, 2)), ((2, 3), (3, 4))]


def test_a_dropped_character_has_no_chunk():
    assert spans(pieces("one|\n|two"), pieces("one|two")) == [((0, 1), (0, 1)), ((2, 3), (1, 2))]


def test_an_added_character_has_no_chunk():
    assert spans(pieces("one|two"), pieces("one| |two")) == [((0, 1), (0, 1)), ((1, 2), (2, 3))]


def test_a_difference_within_a_token_takes_its_chunk():
    assert spans(pieces("a|bXd|efghijklmn"), pieces("a|bYd|efghijklmn")) == [
        ((0, 1), (0, 1)),
        ((2, 3), (2, 3)),
    ]


def test_tokens_without_text_match_nothing():
    assert spans([None], [None]) == []
    assert spans([b"a", None, b"b"], [b"a", b"b"]) == [((0, 1), (0, 1)), ((2, 3), (1, 2))]


def test_tokens_of_no_bytes_belong_to_the_chunk_before():
    assert spans([b"", b"ab"], pieces("a|b")) == [((0, 2), (0, 2))]
    assert spans([b"a", b"", b"b"], pieces("a|b")) == [((0, 2), (0, 1)), ((2, 3), (1, 2))]


def test_what_is_too_different_has_no_chunk():
    assert spans([b"x" * 200], [b"y" * 200]) == []
    assert spans([], []) == []
    assert spans([], [b"a"]) == []
    assert spans([b"a"], []) == []


@pytest.mark.parametrize("seed", range(20))
def test_random_cuts_give_every_common_boundary(seed):
    generator = random.Random(seed)
    text = bytes(generator.choice(b"ab ") for _ in range(60))

    def cut():
        ends = sorted({*generator.sample(range(1, 60), 25), 60})
        return [text[a:b] for a, b in zip([0, *ends], ends, strict=False)], ends

    (one, one_ends), (other, other_ends) = cut(), cut()
    found = aligned(one, other)
    common = sorted({*one_ends} & {*other_ends})
    assert [sum(map(len, one[: span.student[1]])) for span in found] == common
    assert [sum(map(len, other[: span.teacher[1]])) for span in found] == common
    assert [span.student[0] for span in found] == [0, *(s.student[1] for s in found[:-1])]


@pytest.mark.parametrize("seed", range(20))
def test_chunks_next_to_differences_have_equal_bytes(seed):
    generator = random.Random(seed)
    one = [bytes(generator.choices(b"abcdefgh", k=generator.randint(1, 4))) for _ in range(40)]
    other = [piece for piece in one if generator.random() > 0.1]
    other = [b"#" + piece if generator.random() < 0.1 else piece for piece in other]
    found = aligned(one, other)
    assert found
    place = (0, 0)
    for span in found:
        assert b"".join(one[slice(*span.student)]) == b"".join(other[slice(*span.teacher)]) != b""
        assert span.student[0] >= place[0]
        assert span.teacher[0] >= place[1]
        place = span.student[1], span.teacher[1]
    assert sum(span.is_one_to_one for span in found) > 5


def row(ids, spans, num_prompt=1, teacher=(7, 8, 9), **fields):
    aligned = AlignedResponse(teacher, tuple(Span(*span) for span in spans), **fields)
    mask = (False,) * num_prompt + (True,) * (len(ids) - num_prompt)
    return TrainingRow(
        0, "student", tuple(ids), mask, num_prompt, teacher_prompt_ids=(5, 6), aligned=aligned
    )


def test_collation_numbers_the_chunks_of_all_rows():
    first = row([1, 2, 3, 4], [((0, 2), (0, 1))])
    second = row([1, 2, 3], [((0, 1), (0, 1)), ((1, 2), (1, 3))])
    batch = collate([first, fully_masked(first), second])
    assert batch.chunks.student.tolist() == [0, 0, -1, 1, 2]
    assert batch.chunks.teacher.tolist() == [0, 1, 2, 2]
    assert batch.chunks.first.tolist() == [0, 3, 4]
    assert batch.teacher_reads.targets.tolist() == [7, 7, 8, 9]
    assert batch.teacher_input_ids[0].tolist() == [5, 6, 7, 8, 9]
    assert batch.to("cpu").chunks.num == 3


def test_counts_of_chunks():
    found = count_chunks(
        [
            row([1, 2, 3, 4], [((0, 2), (0, 1))], num_unaligned=1),
            row([1, 2, 3, 4], [((0, 1), (0, 1))], num_noncanonical=2),
        ]
    )
    assert found[:, 1].tolist() == [2, 6, 1, 1, 2]


def test_sums_over_chunks_keep_the_gradient():
    chunks = Chunks(torch.tensor([0, 0, -1, 1]), torch.tensor([0, 1]), 2)
    values = torch.tensor([1.0, 2.0, 4.0, 8.0], requires_grad=True)
    found = chunks.sums(values, chunks.student)
    assert found.tolist() == [3.0, 8.0]
    (found * torch.tensor([1.0, 3.0])).sum().backward()
    assert values.grad.tolist() == [1.0, 1.0, 0.0, 3.0]
    empty = Chunks(torch.tensor([-1]), torch.tensor([], dtype=torch.int64), 0)
    assert empty.sums(values[:1], empty.student).requires_grad
