"""Distributions over texts of two models, and the losses between them.

Frozen here: a student of letters and a teacher of letters and pairs with the same distribution over
texts have divergences and gradients of 0 by the mass of texts and by next byte, and not by the
probability of the teacher's own tokens; that mass is the sum over all texts that begin so; tiles do
not change it; its gradient is that of finite differences. One tokenizer as two gives the
divergences of its tokens, next bytes and shared tokens; another cut of a chunk with the same
distribution over texts, or by chunk with the same probability, changes nothing. Shared tokens of
equal distributions differ, which is that loss's bias; tiles do not change it.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from pair_tokenizers import merging
from torch import nn

from okd_lightning.divergences import ForwardKL, JensenShannon, ReverseKL, Tempered
from okd_lightning.losses import ExactDivergence, Side, measure_chunks
from okd_lightning.losses.shared_tokens import NextTokens, compare_next_tokens
from okd_lightning.losses.text_law import TextLaw, cover_masses
from okd_lightning.models.byte_ranges import ByteRanges
from okd_lightning.models.retokenization import Retokenizer
from okd_lightning.records.batches import TrainingRow
from okd_lightning.records.chunks import AlignedResponse, aligned
from okd_lightning.records.collation import collate

EOS, A, B, AB = 1, 3, 4, 5
LETTERS = merging(letters="ab")
PAIRS = merging("ab", letters="ab")
LAW = {"a": 0.5, "b": 0.3, "end": 0.2}
"""Letters are drawn independently, until the end."""

STUDENT = torch.tensor([0.0, LAW["end"], 0.0, LAW["a"], LAW["b"]], dtype=torch.float64).log()


def teacher_logits(before: int) -> torch.Tensor:
    """Return logits of the same distribution over texts, in tokens a, b, ab; never a before b."""
    a, b, end = LAW["a"], LAW["b"], LAW["end"]
    if before == A:  # no b follows
        found = [0, end / (1 - b), 0, a, 0, a * b / (1 - b)]
    else:
        found = [0, end, 0, a * (1 - b), b, a * b]
    return torch.tensor(found, dtype=torch.float64).log()


def batch_of(texts, loss, source="dataset", teacher=PAIRS, student=LETTERS):
    made = Retokenizer(student, teacher, EOS, len(teacher), None, loss)
    rows = []
    for text in texts:
        ids = student(text)["input_ids"]
        mask = (False, *[True] * len(ids))
        row = TrainingRow(0, source, (B, *ids), mask, 1, teacher_prompt_ids=(B,))
        rows.append(made.row(row, (EOS,)))
    return collate(rows)


def sides(batch, student=STUDENT):
    own = student.expand(len(batch.student_reads.targets), -1)
    reads = batch.teacher_reads
    before = reads.input_ids[reads.places.row, reads.places.column - 1].tolist()
    other = torch.stack([teacher_logits(one) for one in before])
    return Side(own, nn.Identity(), (EOS,), 5), Side(other, nn.Identity(), (EOS,), 6), None


TEXTS = ["aab<eos>", "ab<eos>", "abba<eos>", "aaa<eos>", "babaab", "<eos>", "b<eos>"]


@pytest.mark.parametrize("divergence", [ForwardKL(), ReverseKL(), JensenShannon()])
@pytest.mark.parametrize("loss", ["text", "next_byte"])
@pytest.mark.parametrize("source", ["dataset", "student"])
def test_equal_distributions_have_divergence_0(divergence, loss, source):
    batch = batch_of(TEXTS, loss, source)
    student = STUDENT.clone().requires_grad_()
    asked = ExactDivergence(divergence)
    found = measure_chunks(batch, (asked,), sides(batch, student)).at_positions()[asked]
    assert found.abs().max() < 1e-10
    (gradient,) = torch.autograd.grad(found.sum(), student)
    assert gradient.nan_to_num().abs().max() < 1e-7  # floors of 1e-12 in cells without mass


def test_the_teachers_own_tokens_are_biased():
    batch = batch_of(TEXTS, "chunk")
    asked = ExactDivergence(ForwardKL())
    found = measure_chunks(batch, (asked,), sides(batch)).at_positions()[asked]
    assert found.sum() / batch.chunks.num > 0.01


def mass(text: str) -> float:
    return math.prod(LAW[letter] for letter in text)


def test_reach_is_the_mass_of_all_texts_that_begin_so():
    batch = batch_of(TEXTS, "text")
    chunks, points = batch.chunks, batch.chunks.points
    own, other, _ = sides(batch)
    order = points.vocabularies.teacher
    targets = batch.teacher_reads.targets
    logprobs = other.hidden.gather(-1, targets[:, None])[:, 0]
    for size in (1, 3, None):
        masses = cover_masses(other, points.teacher, order, 1.0, size)
        law = TextLaw(points.teacher, masses, logprobs)
        path = chunks.sums(logprobs, chunks.teacher)
        found = law.chunk_logprobs(points.start, points.end, path)
        of_student = own.hidden.gather(-1, batch.student_reads.targets[:, None])[:, 0]
        expected = chunks.sums(of_student, chunks.student)
        torch.testing.assert_close(found, expected)
    assert (law.reach > 1.2).any()


def test_next_bytes_are_those_of_the_distribution():
    batch = batch_of(["aab<eos>"], "next_byte")
    points = batch.chunks.points
    _, other, _ = sides(batch)
    logprobs = other.hidden.gather(-1, batch.teacher_reads.targets[:, None])[:, 0]
    masses = cover_masses(other, points.teacher, points.vocabularies.teacher, 1.0, None)
    law = TextLaw(points.teacher, masses, logprobs)
    found = law.next_bytes(points.start, points.vocabularies.alphabet).exp()
    expected = torch.tensor([LAW["a"], LAW["b"], LAW["end"], 0.0], dtype=torch.float64)
    torch.testing.assert_close(found, expected.expand_as(found))
    assert len(found) == batch.chunks.num == 3  # a, ab and the end


def test_the_gradient_reaches_both_models():
    torch.manual_seed(0)
    batch = batch_of(["aabab<eos>", "ba<eos>"], "text")
    own = torch.randn(len(batch.student_reads.targets), 5, dtype=torch.float64, requires_grad=True)
    other = torch.randn(
        len(batch.teacher_reads.targets), 6, dtype=torch.float64, requires_grad=True
    )

    def value(loss, learner, student, teacher):
        batch = batch_of(["aabab<eos>", "ba<eos>"], loss)
        asked = ExactDivergence(Tempered(JensenShannon(), 2.0), learner)
        pair = Side(student, nn.Identity(), (EOS,), 5), Side(teacher, nn.Identity(), (EOS,), 6)
        return measure_chunks(batch, (asked,), (*pair, None)).at_positions()[asked].sum()

    for loss in ("text", "next_byte", "chunk", "shared_tokens"):
        assert torch.autograd.gradcheck(
            lambda student, loss=loss: value(loss, "student", student, other.detach()), own
        )
        assert torch.autograd.gradcheck(
            lambda teacher, loss=loss: value(loss, "teacher", own.detach(), teacher), other
        )


@pytest.mark.parametrize("prefix", [b"", b"a", b"ab", b"b", b"c", b"abc", b"\xff"])
def test_ranges_hold_the_tokens_that_begin_so(prefix):
    pieces = [b"b", None, b"ab", b"a", b"abc", b"\xff", b"\xff\xff", b"a", b"ac"]
    ranges = ByteRanges(pieces)
    low, high = ranges.bounds(prefix)
    expected = {
        i for i, piece in enumerate(pieces) if piece is not None and piece.startswith(prefix)
    }
    assert set(ranges.order[low:high]) == expected
    splits = ranges.splits(prefix)
    assert (splits[0], splits[-1], len(splits)) == (low, high, 258)
    for byte, (start, end) in enumerate(itertools.pairwise(splits[1:])):
        own = {i for i in expected if pieces[i].startswith(prefix + bytes([byte]))}
        assert set(ranges.order[start:end]) == own


@pytest.mark.parametrize("loss", ["text", "next_byte"])
@pytest.mark.parametrize("texts", [["ab"], ["<eos>"]])
def test_batches_with_few_chunks(loss, texts):
    batch = batch_of(texts, loss)  # the only chunk of a cut response carries no loss
    asked = ExactDivergence(ForwardKL())
    student = STUDENT.clone().requires_grad_()
    if batch.chunks.num:
        given = sides(batch, student)
    else:
        own = Side(student.expand(0, -1), nn.Identity(), (EOS,), 5)
        given = (own, Side(torch.zeros(0, 6).double(), nn.Identity(), (EOS,), 6), None)
    found = measure_chunks(batch, (asked,), given).at_positions()[asked]
    assert found.requires_grad
    assert abs(float(found.detach().sum())) < 1e-10


def test_a_gap_ends_the_covers():
    teacher = merging("ab", letters="ab")
    made = Retokenizer(LETTERS, teacher, EOS, len(teacher), None, "text")
    ids = (B, A, 2, A, B, EOS)  # a <bos> ab <eos>
    row = TrainingRow(0, "student", ids, (False, *[True] * 5), 1, teacher_prompt_ids=(B,))
    points = made.row(row, (EOS,)).aligned.points
    assert all(cover.token >= 2 for cover in points.student if points.places[cover.point][0] > 2)
    batch = collate([made.row(row, (EOS,))])
    assert batch.to("cpu").chunks.points.vocabularies.alphabet.tolist() == [97, 98]


def random_sides(batch, sizes=(5, 5)):
    torch.manual_seed(0)
    reads = (batch.student_reads, batch.teacher_reads)
    logits = [
        torch.randn(len(one.targets), size, dtype=torch.float64)
        for one, size in zip(reads, sizes, strict=True)
    ]
    own, other = (
        Side(one, nn.Identity(), (EOS,), size) for one, size in zip(logits, sizes, strict=True)
    )
    return own, other, None


@pytest.mark.parametrize("divergence", [ForwardKL(), Tempered(JensenShannon(), 2.0)])
@pytest.mark.parametrize("loss", ["chunk", "text", "next_byte", "shared_tokens"])
def test_one_tokenizer_as_two_gives_its_own_reference(loss, divergence):
    texts = ["aab<eos>", "b<eos>", "<eos>"]
    batch = batch_of(texts, loss, teacher=LETTERS)
    given = random_sides(batch)
    asked = ExactDivergence(divergence)
    found = measure_chunks(batch, (asked,), given).at_positions()[asked]
    inner, temperature = divergence, 1.0
    if isinstance(divergence, Tempered):
        inner, temperature = divergence.divergence, divergence.temperature
    student, teacher = ((side.hidden / temperature).softmax(-1) for side in given[:2])
    targets = batch.student_reads.targets

    def cells(probabilities):
        """a, b, the end, and what is no text; or the target and everything else."""
        if loss in ("chunk", "text"):
            own = probabilities.gather(-1, targets[:, None])
            return torch.cat([own, 1 - own], -1)
        return torch.cat(
            [probabilities[:, [A, B, EOS]], probabilities[:, [0, 2]].sum(-1, True)], -1
        )

    expected = temperature**2 * inner.value(cells(student).log(), cells(teacher).log())
    assert len(found) == 7
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("loss", ["text", "next_byte"])
def test_another_cut_with_the_same_distribution_changes_nothing(loss):
    """The student's ab is one chunk, which one teacher cuts as ab and one as a and b."""
    found = []
    for teacher in (PAIRS, LETTERS):
        batch = batch_of(["aab<eos>", "abba<eos>"], loss, teacher=teacher, student=PAIRS)
        own = random_sides(batch, (6, 6))[0]
        if teacher is PAIRS:
            other = sides(batch)[1]
        else:
            law = STUDENT.expand(len(batch.teacher_reads.targets), -1)
            other = Side(law, nn.Identity(), (EOS,), 5)
        asked = ExactDivergence(ReverseKL())
        values = measure_chunks(batch, (asked,), (own, other, None)).at_positions()[asked]
        found.append((values, batch.teacher_reads.targets))
    assert len(found[0][1]) < len(found[1][1])
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-9, atol=1e-9)


def test_another_cut_of_the_same_probability_changes_no_chunk():
    found = []
    for pieces, ids in (([b"a", b"bba"], (3, 4)), ([b"abb", b"a"], (4, 3))):
        spans = tuple(aligned([b"ab", b"ba"], pieces))
        row = TrainingRow(
            0,
            "dataset",
            (2, 3, 4),
            (False, True, True),
            1,
            teacher_prompt_ids=(2,),
            aligned=AlignedResponse(ids, spans),
        )
        batch = collate([row])
        logits = torch.tensor([[0.0, 0.0, 1.0, 2.0, 0.5]], dtype=torch.float64).expand(2, -1)
        own, other = (
            Side(logits, nn.Identity(), (EOS,), 5),
            Side(logits / 3, nn.Identity(), (EOS,), 5),
        )
        asked = ExactDivergence(ForwardKL())
        found.append(measure_chunks(batch, (asked,), (own, other, None)).at_positions()[asked])
        assert batch.chunks.num == 1
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=0)


def test_shared_tokens_are_biased_and_tiles_do_not_change_them():
    batch = batch_of(TEXTS, "shared_tokens")
    given = sides(batch)
    chunks = batch.chunks
    own, other = (
        NextTokens(side, first, shared, 1.0)
        for side, first, shared in zip(
            given[:2], (chunks.first, chunks.first_of_teacher), chunks.shared, strict=True
        )
    )
    whole = compare_next_tokens(own, other, ForwardKL().value, (True, False))
    tiles = compare_next_tokens(own, other, ForwardKL().value, (True, False), 2)
    torch.testing.assert_close(whole, tiles)
    assert whole.mean() > 0.01
    # where a has been read, the teacher writes no b: a, b, the end, and ab
    law = torch.stack([STUDENT.exp()[[A, B, EOS]], teacher_logits(A).exp()[[A, B, EOS]]])
    cells = torch.cat([law, 1 - law.sum(-1, True)], -1).clamp(min=1e-12).log()
    assert any(torch.isclose(ForwardKL().value(*cells), value) for value in whole)
