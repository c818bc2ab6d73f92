"""Several models as one distribution, and as one head.

Frozen here: a mixture is the log of the weighted mean of probabilities, a product the normalised
weighted geometric mean over outcomes; the divergence of every f at temperatures 1 and 2 (mixed,
then tempered) is that of the enumerated distribution, with the student's gradient; a product of
models with other end ids ends, and shares its end between the ids; gradients are those of finite
differences, and finite where ids are masked; rows of different models keep their own heads.
"""

from __future__ import annotations

import math
from dataclasses import replace

import divergence_reference as reference
import pytest
import torch
from divergence_cases import CASES
from mpmath import exp, log, mpf
from torch import nn

from okd_lightning.divergences import ForwardKL, Tempered
from okd_lightning.losses import (
    ExactDivergence,
    Measured,
    Mixture,
    Product,
    Side,
    Term,
    WeightedTerm,
    fused_loss,
    measure,
    mixed_side,
    routed_side,
)
from okd_lightning.losses.reduction import loss_output

VOCAB, POSITIONS, WEIGHTS = 7, 5, (0.3, 0.7)
ENDS = (2, 5)


def side(seed: int, width: int, learns: bool = False, end_ids: tuple[int, ...] = ()) -> Side:
    generator = torch.Generator().manual_seed(seed)
    head = nn.Linear(width, VOCAB, dtype=torch.float64)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    hidden = torch.randn(POSITIONS, width, generator=generator, dtype=torch.float64)
    head.requires_grad_(learns)
    return Side(hidden.requires_grad_(learns), head, end_ids)


def probabilities(one: Side) -> list[list]:
    """[positions][vocab] in 50 digits, from the logits."""
    found = []
    for row in one.head(one.hidden).tolist():
        parts = [exp(mpf(x)) for x in row]
        found.append([part / sum(parts) for part in parts])
    return found


def mixed(kind: str, first: list, second: list) -> list:
    """Return one position's mixed distribution, in 50 digits."""
    w, v = (mpf(str(weight)) for weight in WEIGHTS)
    if kind == "mixture":
        return [w * p + v * q for p, q in zip(first, second, strict=True)]
    parts = [p**w * q**v for p, q in zip(first, second, strict=True)]
    return [part / sum(parts) for part in parts]


def tempered(distribution: list, temperature: float) -> list:
    parts = [p ** (1 / mpf(temperature)) for p in distribution]
    return [part / sum(parts) for part in parts]


KINDS = {"mixture": Mixture(WEIGHTS), "product": Product(WEIGHTS)}
FAR = (1e-7, 1e7)


@pytest.mark.parametrize(
    ("kind", "temperature"), [("mixture", 1.0), ("mixture", 2.0), ("product", 2.0)]
)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_every_divergence_is_that_of_the_enumerated_distribution(case, kind, temperature):
    student, one, other = side(1, 4, learns=True), side(2, 3), side(3, 6)
    teacher = mixed_side([one, other], KINDS[kind])
    divergence = case.divergence
    if temperature != 1.0:
        divergence = Tempered(divergence, temperature)
    (found,) = measure(
        [ExactDivergence(divergence)],
        student,
        teacher,
        torch.zeros(POSITIONS, dtype=torch.int64),
        VOCAB,
        tile_positions=2,
    ).values()
    rows = zip(probabilities(student), probabilities(one), probabilities(other), strict=True)
    for value, (p, first, second) in zip(found.tolist(), rows, strict=True):
        q = tempered(mixed(kind, first, second), temperature)
        sides = [[log(x) for x in row] for row in (tempered(p, temperature), q)]
        expected = reference.divergence_with_zeros(case.f, case.at_zero, case.at_infinity, *sides)
        scale = temperature**2
        assert value == pytest.approx(float(expected) * scale, rel=1e-9, abs=1e-9)


def kd(learner: str = "student") -> WeightedTerm:
    quantity = ExactDivergence(ForwardKL(), learner)
    term = Term(
        "kd",
        ("dataset",),
        (quantity,),
        lambda measured: loss_output(measured[quantity], measured.mask(("dataset",))),
        lambda step: 1.0,
    )
    return WeightedTerm(term, 0.25)


def about() -> Measured:
    zeros = torch.zeros(POSITIONS, dtype=torch.int64)
    return Measured({}, zeros, zeros, torch.zeros(POSITIONS))


@pytest.mark.parametrize("kind", KINDS)
def test_the_one_pass_gives_the_gradients_of_the_explicit_distribution(kind):
    student = side(1, 4, learns=True)
    one, other = side(2, 3, learns=True), side(3, 6)
    targets = torch.zeros(POSITIONS, dtype=torch.int64)
    for learner in ("student", "teacher"):
        teacher = mixed_side([one, other], KINDS[kind])
        loss = fused_loss([kd(learner)], student, teacher, targets, about(), VOCAB, 2).total
        logits = [s.head(s.hidden) for s in (one, other)]
        explicit = KINDS[kind](logits, ()).log_softmax(-1)
        own = student.head(student.hidden).log_softmax(-1)
        expected = 0.25 * (explicit.exp() * (explicit - own)).sum()
        assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
        of = student if learner == "student" else one
        wanted = [of.hidden, *of.head.parameters()]
        found = torch.autograd.grad(loss, wanted)
        for mine, theirs in zip(found, torch.autograd.grad(expected, wanted), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)
        assert not other.hidden.requires_grad


@pytest.mark.parametrize("end_ids", [(), ENDS])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_finite_differences(kind, end_ids):
    generator = torch.Generator().manual_seed(5)
    logits = [
        torch.randn(3, VOCAB, generator=generator, dtype=torch.float64).requires_grad_()
        for _ in range(2)
    ]
    assert torch.autograd.gradcheck(lambda *both: KINDS[kind](both, end_ids), logits)


@pytest.mark.parametrize("kind", KINDS)
def test_masked_ids_have_no_probability_and_no_gradient(kind):
    logits = [torch.randn(2, VOCAB, dtype=torch.float64) for _ in range(2)]
    for one in logits:
        one[:, -1] = -math.inf
        one.requires_grad_()
    found = KINDS[kind](logits, ())
    assert (found[:, -1] == -math.inf).all()
    found[:, 0].sum().backward()
    for one in logits:
        assert one.grad.isfinite().all()
        assert (one.grad[:, -1] == 0).all()


def test_a_product_of_models_with_other_ends_ends():
    first, second = (torch.full((1, VOCAB), -20.0, dtype=torch.float64) for _ in range(2))
    first[0, ENDS[0]] = second[0, ENDS[1]] = 3.0
    first[0, 0] = second[0, 0] = 3.0
    merged = Product((0.5, 0.5))([first, second], ENDS).exp()
    assert float(merged[0, list(ENDS)].sum()) == pytest.approx(0.5, abs=1e-6)
    assert merged[0, ENDS[0]] == pytest.approx(float(merged[0, ENDS[1]]), rel=1e-9)
    assert float(merged.sum()) == pytest.approx(1.0, rel=1e-12)
    apart = Product((0.5, 0.5))([first, second], ()).exp()
    assert float(apart[0, list(ENDS)].sum()) < 1e-4


def test_the_ends_of_a_mixture_may_be_merged_before_or_after():
    one, other = side(2, 3, end_ids=ENDS), side(3, 6, end_ids=ENDS)
    student = side(1, 4, end_ids=ENDS)
    targets = torch.tensor([0, 2, 5, 1, 2])
    (found,) = measure(
        [ExactDivergence(ForwardKL())],
        student,
        mixed_side([one, other], Mixture(WEIGHTS)),
        targets,
        VOCAB,
    ).values()
    for value, *rows in zip(
        found.tolist(), *map(probabilities, (student, one, other)), strict=True
    ):
        p, first, second = ([*(row[i] for i in (0, 1, 3, 4, 6)), row[2] + row[5]] for row in rows)
        q = mixed("mixture", first, second)
        expected = sum(b * log(b / a) for a, b in zip(p, q, strict=True))
        assert value == pytest.approx(float(expected), rel=1e-10)


@pytest.mark.parametrize("learns", [False, True])
def test_each_position_has_the_head_of_its_model(learns):
    one, other = side(2, 3, learns), side(3, 6)
    own, others = torch.tensor([1, 4]), torch.tensor([0, 2, 3])
    routed = routed_side([replace(one, hidden=one.hidden[own]), _of(other, others)], [own, others])
    logits = routed.head(routed.hidden)
    torch.testing.assert_close(logits[own], one.head(one.hidden[own]), rtol=0, atol=0)
    torch.testing.assert_close(logits[others], other.head(other.hidden[others]), rtol=0, atol=0)
    part = routed.head(routed.hidden[1:3])
    torch.testing.assert_close(part, logits[1:3], rtol=0, atol=1e-12)
    assert logits.requires_grad == learns
    if learns:
        logits.square().sum().backward()
        weight, hidden = one.head.weight.grad.clone(), one.hidden.grad.clone()
        expected = one.head(one.hidden[own]).square().sum()
        found = torch.autograd.grad(expected, [one.head.weight, one.hidden])
        torch.testing.assert_close([weight, hidden], list(found))


def _of(one: Side, rows: torch.Tensor) -> Side:
    return replace(one, hidden=one.hidden[rows])
