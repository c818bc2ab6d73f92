"""Top-k with a tail.

Frozen here (METHODS.md section 5, test 9): at most the exact divergence, equal to it at k = V,
never negative, from either side; gradients are those of the coarser distributions; where all the
mass lies within the k ids the tail contributes nothing and its gradient is finite; tempering comes
first.
"""

from __future__ import annotations

import math

import pytest
import torch
from divergence_cases import CASES, Case

from okd_lightning.divergences import ForwardKL, JensenShannon, ReverseKL, Tempered, TopK
from okd_lightning.errors import ConfigError

SIDES = ["teacher", "student"]


@pytest.fixture
def logprobs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(9)
    both = 3 * torch.randn(2, 4, 7, generator=generator, dtype=torch.float64)
    student, teacher = both.log_softmax(-1)
    return student, teacher


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_a_lower_bound_that_grows_to_the_exact_one(case: Case, side, logprobs):
    exact = case.divergence.value(*logprobs)
    rounding = 1e-9 * (1 + exact.abs())
    before = torch.zeros_like(exact)
    for k in range(1, 8):
        value = TopK(case.divergence, k, side).value(*logprobs)
        assert (value >= before - rounding).all()  # nested choices: each splits the last tail
        assert (value <= exact + rounding).all()
        before = value
    torch.testing.assert_close(before, exact)
    torch.testing.assert_close(TopK(case.divergence, 99, side).value(*logprobs), exact)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("divergence", [ForwardKL(), JensenShannon(0.3)], ids=repr)
def test_value_and_gradient_by_hand(divergence, side, logprobs):
    leaves = [values.clone().requires_grad_() for values in logprobs]
    value = TopK(divergence, 2, side).value(*leaves)
    found = torch.autograd.grad(value.sum(), leaves)
    p, q = leaves[0].exp(), leaves[1].exp()
    total = 0.0
    for row in range(4):
        order = (q if side == "teacher" else p)[row].argsort(descending=True)
        groups = [order[:1], order[1:2], order[2:]]
        for group in groups:
            mass_p, mass_q = p[row, group].sum(), q[row, group].sum()
            total = total + mass_p * divergence.generator((mass_q / mass_p).log())
    torch.testing.assert_close(value.sum(), total)
    for got, wanted in zip(found, torch.autograd.grad(total, leaves), strict=True):
        torch.testing.assert_close(got, wanted)


def test_the_truth_of_renormalising(logprobs):
    """Two distributions that agree within the top-k, and not on its mass, are not at distance 0."""
    teacher = torch.tensor([[0.05, 0.05, 0.9]]).log()
    student = torch.tensor([[0.45, 0.45, 0.1]]).log()
    value = TopK(ReverseKL(), 2, "student").value(student, teacher)
    assert value.item() == pytest.approx(0.9 * math.log(9) + 0.1 * math.log(1 / 9))


@pytest.mark.parametrize("side", SIDES)
def test_an_empty_tail(side):
    student = torch.tensor([[0.0, 1.0, -math.inf, -math.inf]], requires_grad=True)
    teacher = torch.tensor([[1.0, 0.0, -math.inf, -math.inf]], requires_grad=True)
    log_p, log_q = student.log_softmax(-1), teacher.log_softmax(-1)
    value = TopK(ForwardKL(), 2, side).value(log_p, log_q)
    torch.testing.assert_close(value, ForwardKL().value(log_p, log_q))
    for gradient in torch.autograd.grad(value.sum(), (student, teacher)):
        assert gradient.isfinite().all()


def test_sampled_tokens_are_read_as_their_outcome(logprobs):
    student, teacher = logprobs
    coarse = TopK(ReverseKL(), 2)
    best = teacher.argsort(-1, descending=True)
    for rank in range(7):
        p, q = coarse.drawn(student, teacher, best[:, rank])
        group = best[:, [rank]] if rank < 2 else best[:, 2:]
        torch.testing.assert_close(p, student.gather(-1, group).logsumexp(-1))
        torch.testing.assert_close(q, teacher.gather(-1, group).logsumexp(-1))


def test_tempering_comes_first(logprobs):
    tempered = Tempered(TopK(ForwardKL(), 3), 2.0)
    by_hand = TopK(ForwardKL(), 3).value(*((side / 2).log_softmax(-1) for side in logprobs))
    torch.testing.assert_close(tempered.value(*logprobs), 4 * by_hand)
    with pytest.raises(ConfigError, match=r"temper first: Tempered\(TopK"):
        TopK(Tempered(ForwardKL(), 2.0), 3)


def test_settings_out_of_range():
    with pytest.raises(ConfigError, match="k is 0, expected at least 1"):
        TopK(ForwardKL(), 0)
    with pytest.raises(ConfigError, match="side is 'both'"):
        TopK(ForwardKL(), 2, "both")
