"""Losses over chunks of text, for a teacher with another tokenizer.

Frozen here: by enumeration, the chunk advantage has the exact gradient of any f-divergence between
both distributions over texts, on its own samples and with an importance ratio; two equal
distributions have losses and gradients of 0; the two-cell divergence equals its formula, also at
probabilities near 0 and 1, and its gradient reaches its learner alone; single-token comparisons are
refused.
"""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from okd_lightning.callbacks import GKD, KD, OKD, OPD, OPDPlus
from okd_lightning.divergences import (
    ForwardKL,
    Jeffreys,
    JensenShannon,
    PearsonChiSquared,
    ReverseKL,
    SquaredHellinger,
    Tempered,
    TopK,
)
from okd_lightning.errors import ConfigError
from okd_lightning.losses import (
    Agreement,
    ChunkValues,
    DrawnLogProb,
    ExactDivergence,
    Measured,
    TeacherShift,
    WeightedTerm,
    chunked_loss,
    token_values,
)
from okd_lightning.losses.chunked import OutcomeLogProb, two_cells
from okd_lightning.records.chunks import Chunks, aligned

DIVERGENCES = [
    ReverseKL(),
    ForwardKL(),
    JensenShannon(0.3),
    Jeffreys(),
    SquaredHellinger(),
    PearsonChiSquared(),
]
NUM = 3


@dataclass
class Pair:
    """A student of two letters and a teacher of one pair of them: all texts, one per row."""

    seed: int
    first: Tensor = field(init=False)
    second: Tensor = field(init=False)
    teacher: Tensor = field(init=False)

    def __post_init__(self):
        torch.manual_seed(self.seed)
        self.first = torch.randn(NUM, dtype=torch.float64, requires_grad=True)
        self.second = torch.randn(NUM, NUM, dtype=torch.float64, requires_grad=True)
        self.teacher = torch.randn(NUM * NUM, dtype=torch.float64).log_softmax(-1)

    @property
    def tokens(self) -> Tensor:
        """[texts, 2] the student's log-probabilities."""
        first, second = self.first.log_softmax(-1), self.second.log_softmax(-1)
        texts = itertools.product(range(NUM), repeat=2)
        return torch.stack([torch.stack([first[a], second[a, b]]) for a, b in texts])

    @property
    def parameters(self):
        return [self.first, self.second]

    def measured(self, sampler: Tensor) -> tuple[Measured, ChunkValues]:
        tokens = self.tokens.flatten()
        row = torch.arange(NUM * NUM)
        chunks = Chunks(row.repeat_interleave(2), row, NUM * NUM)
        key = OutcomeLogProb()
        found = {
            ("student", key): tokens,
            ("student", DrawnLogProb()): tokens,
            ("teacher", key): self.teacher,
        }
        about = Measured({}, torch.ones(len(tokens)), chunks.student, sampler.flatten())
        return about, ChunkValues(chunks, found)


def gradient_of(loss: Tensor, parameters, keeps: bool = False) -> Tensor:
    found = torch.autograd.grad(loss, parameters, retain_graph=keeps)
    return torch.cat([gradient.flatten() for gradient in found])


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=lambda d: type(d).__name__)
@pytest.mark.parametrize("variant", ["value_baseline", "centred", "as_published"])
def test_the_chunk_advantage_has_the_exact_gradient(divergence, variant):
    term = OPDPlus(divergence, variant).term
    for seed in range(10):
        pair = Pair(seed)
        law = pair.tokens.sum(-1)
        exact = gradient_of(
            (law.exp() * divergence.generator(pair.teacher - law)).sum(), pair.parameters
        )
        # every text once, as from a uniform sampler: the ratio is p(text) times their number
        uniform = torch.full((NUM * NUM, 2), -math.log(NUM), dtype=torch.float64)
        about, values = pair.measured(uniform)
        loss = chunked_loss([WeightedTerm(term, 1 / NUM**2)], about, values)
        found = gradient_of(loss.total, pair.parameters)
        assert (found - exact).norm() < 1e-12 * exact.norm()


TOKENS = {b"a": 0, b"b": 1, b"ab": 2}


class Letters:
    """A student of letters and a teacher that writes ab as one token: all texts of three."""

    def __init__(self, seed):
        torch.manual_seed(seed)
        prefixes = [p for n in range(3) for p in itertools.product("ab", repeat=n)]
        self.logits = {p: torch.randn(2, dtype=torch.float64, requires_grad=True) for p in prefixes}
        self.teacher = {}

    @property
    def parameters(self):
        return list(self.logits.values())

    def row(self, text):
        """The student's and the teacher's log-probabilities of a text's tokens, and its chunks."""
        student = [letter.encode() for letter in text]
        parts = re.findall("ab|a|b", "".join(text))
        teacher = [part.encode() for part in parts]
        own = [
            self.logits[text[:i]].log_softmax(-1)["ab".index(letter)]
            for i, letter in enumerate(text)
        ]
        other = []
        for i, token in enumerate(teacher):
            before = tuple(teacher[:i])
            if before not in self.teacher:
                self.teacher[before] = torch.randn(3, dtype=torch.float64).log_softmax(-1)
            other.append(self.teacher[before][TOKENS[token]])
        spans = aligned(student, teacher)
        sides = ([s.student for s in spans], [s.teacher for s in spans])
        index = [
            torch.tensor([n for n, (a, b) in enumerate(side) for _ in range(a, b)])
            for side in sides
        ]
        return torch.stack(own), torch.stack(other), Chunks(*index, len(spans))


@pytest.mark.parametrize("divergence", [ReverseKL(), ForwardKL(), JensenShannon()], ids=str)
@pytest.mark.parametrize("is_whole", [True, False])
def test_the_whole_return_has_the_exact_gradient(divergence, is_whole):
    method = OPDPlus(divergence, "as_published", discount=1.0)
    key = OutcomeLogProb()
    for seed in range(5):
        pair, exact, found = Letters(seed), 0.0, 0.0
        for text in itertools.product("ab", repeat=3):
            own, other, chunks = pair.row(text)
            law = own.sum().exp()
            ratio = chunks.sums(other, chunks.teacher) - chunks.sums(own, chunks.student)
            exact = exact + law * divergence.generator(ratio).sum()
            tokens = {
                ("student", key): own,
                ("student", DrawnLogProb()): own,
                ("teacher", key): other,
            }
            about = Measured({}, torch.ones(3), torch.zeros(3, dtype=torch.int64), own.detach())
            values = ChunkValues(chunks, tokens)
            if is_whole:
                loss = chunked_loss([WeightedTerm(method.term, 1.0)], about, values).total
            else:  # rewards from a chunk's beginning on
                sampled = [
                    chunks.sums(one, index)[None].detach()
                    for one, index in ((own, chunks.student), (other, chunks.teacher))
                ]
                is_all = torch.ones(1, chunks.num, dtype=torch.bool)
                credit = method.advantage.credit(*sampled, is_all)
                loss = -(credit[0] * chunks.sums(own, chunks.student)).sum()
            found = found + law.detach() * loss
        expected = gradient_of(exact, pair.parameters, keeps=True)
        error = (gradient_of(found, pair.parameters) - expected).norm() / expected.norm()
        assert (error < 1e-12) == is_whole


def test_per_token_advantage_would_not_be():
    errors = []
    for seed in range(20):
        pair = Pair(seed)
        tokens = pair.tokens
        law = tokens.sum(-1)
        exact = gradient_of((law.exp() * (law - pair.teacher)).sum(), pair.parameters)
        share = (pair.teacher / 2)[:, None] - tokens.detach()  # the uniform split of L_T
        loss = -(law.exp().detach()[:, None] * share * pair.tokens).sum()
        found = gradient_of(loss, pair.parameters)
        errors.append(float((found - exact).norm() / exact.norm()))
    assert sum(errors) / 20 > 0.2


@pytest.mark.parametrize("method", [OPD(), OPDPlus(ForwardKL()), GKD(on_policy_fraction=1.0)])
def test_equal_distributions_have_no_loss_and_no_gradient(method):
    pair = Pair(1)
    with torch.no_grad():
        pair.second.copy_(pair.first.expand(NUM, NUM))
    law = pair.first.detach().log_softmax(-1)
    pair.teacher = (law[:, None] + law).flatten()
    about, values = pair.measured(pair.tokens.detach())
    loss = chunked_loss([WeightedTerm(method.term, 1.0)], about, values)
    assert abs(float(loss.total.detach())) < 1e-12
    assert gradient_of(loss.total, pair.parameters).abs().max() < 1e-12
    assert int(loss.outputs[0].count) == 2 * NUM * NUM


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=lambda d: type(d).__name__)
@pytest.mark.parametrize("learner", ["student", "teacher"])
def test_the_chunk_divergence_is_that_of_two_cells(divergence, learner):
    student = torch.tensor([-0.2, -3.0, -0.01], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([-0.5, -0.1, -2.0], dtype=torch.float64, requires_grad=True)
    index = torch.arange(3)
    key = OutcomeLogProb()
    tokens = {("student", key): student, ("teacher", key): teacher}
    values = ChunkValues(Chunks(index, index, 3), tokens)
    found = values.of(ExactDivergence(divergence, learner))
    p, q = student.detach().exp(), teacher.detach().exp()
    expected = sum(a * divergence.generator((b / a).log()) for a, b in ((p, q), (1 - p, 1 - q)))
    torch.testing.assert_close(found.detach(), expected)
    own, other = (student, teacher) if learner == "student" else (teacher, student)
    (gradient, none) = torch.autograd.grad(found.sum(), [own, other], allow_unused=True)
    assert none is None or not none.any()
    step = 1e-6

    def moved(by):
        shifted = own.detach() + by
        pair = (shifted, other.detach()) if learner == "student" else (other.detach(), shifted)
        tokens = dict(zip((("student", key), ("teacher", key)), pair, strict=True))
        return ChunkValues(Chunks(index, index, 3), tokens).of(ExactDivergence(divergence, learner))

    numeric = (moved(step) - moved(-step)) / (2 * step)
    torch.testing.assert_close(gradient, numeric.detach(), rtol=1e-4, atol=1e-6)


def test_cells_near_0_and_1_are_finite():
    logprobs = torch.tensor([0.0, -1e-9, -1e-6, -200.0], requires_grad=True)
    cells = two_cells(logprobs)
    assert cells.dtype == torch.float64
    assert cells.isfinite().all()
    torch.testing.assert_close(cells.exp().sum(-1), torch.ones(4, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(ForwardKL().value(cells, cells.detach()).sum(), logprobs)
    assert gradient.isfinite().all()
    exact = two_cells(torch.tensor([-1e-13], dtype=torch.float64))
    assert float(exact[0, 1].detach()) == pytest.approx(math.log(1e-13), rel=1e-3)


def test_a_temperature_keeps_its_square():
    key = OutcomeLogProb(2.0)
    index = torch.arange(1)
    tokens = {("student", key): torch.tensor([-0.5]), ("teacher", key): torch.tensor([-1.5])}
    values = ChunkValues(Chunks(index, index, 1), tokens)
    found = values.of(ExactDivergence(Tempered(ForwardKL(), 2.0)))
    p, q = math.exp(-0.5), math.exp(-1.5)
    expected = q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))
    assert float(found) == pytest.approx(4 * expected, rel=1e-6)


def test_the_shift_of_the_teacher_compares_its_chunks():
    key, index = OutcomeLogProb(), torch.arange(1)
    adapted = torch.tensor([-0.5], requires_grad=True)
    tokens = {("teacher", key): adapted, ("base", key): torch.tensor([-1.5], requires_grad=True)}
    values = ChunkValues(Chunks(index, index, 1), tokens)
    assert not values.of(TeacherShift()).requires_grad
    (gradient,) = torch.autograd.grad(values.of(TeacherShift(learns=True)).sum(), adapted)
    assert gradient.abs().sum() > 0.1


def test_values_at_positions_lie_on_the_first_token():
    key = OutcomeLogProb()
    chunks = Chunks(torch.tensor([0, 0, -1, 1]), torch.tensor([0, 1, 1]), 2)
    tokens = {
        ("student", key): torch.tensor([-1.0, -1.0, -9.0, -2.0]),
        ("teacher", key): torch.tensor([-2.0, -1.0, -0.5]),
    }
    asked = ExactDivergence(ReverseKL())
    found = ChunkValues(chunks, tokens, (asked,)).at_positions()[asked]
    assert found.nonzero().flatten().tolist() == [3]  # the first chunk's distributions agree
    assert float(found[3]) > 0


def test_the_ratio_is_the_chunks():
    pair = Pair(3)
    sampler = pair.tokens.detach() + torch.tensor([0.3, -0.1], dtype=torch.float64)
    about, values = pair.measured(sampler)
    term = OPDPlus(ReverseKL(), "centred", clip=0.1).term
    loss = chunked_loss([WeightedTerm(term, 1.0)], about, values)
    assert float(loss.outputs[0].metrics["opd_plus_ratio_bounded"]) == NUM * NUM  # ρ = exp(-0.2)
    assert float(loss.outputs[0].metrics["sampler_gap"]) == pytest.approx(0.2 * NUM * NUM)


@pytest.mark.parametrize(
    ("quantity", "words"),
    [
        (Agreement(), "Agreement, which compares single tokens"),
        (ExactDivergence(TopK(ForwardKL(), 4)), "TopK is over single tokens"),
    ],
)
def test_comparisons_of_single_tokens_are_refused(quantity, words):
    with pytest.raises(ConfigError, match=words):
        token_values(quantity)


def test_quantities_of_the_methods_have_a_form():
    for method in (KD(temperature=2.0), GKD(), OKD(anchor_weight=0.1), OPD(), OPDPlus()):
        for quantity in method.quantities:
            token_values(quantity)
