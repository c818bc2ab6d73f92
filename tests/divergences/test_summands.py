"""The closed forms that the fused loss is made of.

Frozen here: for every divergence the summands add up to ``value``, and both gradients in the logits
that follow from them are autograd's, in float64, in float32 up to 200 nats and where both sides are
almost equal; temperature composes; a divergence whose ``value`` is its own does not claim a
temperature; one that merges ids is known by it, within a temperature too.
"""

from __future__ import annotations

import math

import pytest
import torch
from divergence_cases import CASES, Case
from torch import Tensor

from okd_lightning.divergences import Divergence, ForwardKL, LogProbPair, Tempered, TopK


@pytest.fixture(params=CASES, ids=lambda case: case.id)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def logits(scale: float, dtype=torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    student = 2 * torch.randn(4, 9, generator=generator, dtype=torch.float64)
    teacher = student + scale * torch.randn(4, 9, generator=generator, dtype=torch.float64)
    return student.to(dtype), teacher.to(dtype)


def by_closed_form(divergence: Divergence, student: Tensor, teacher: Tensor):
    """Value and gradients in the logits at the divergence's own temperature."""
    tau = divergence.softmax_temperature
    pair = LogProbPair((student / tau).log_softmax(-1), (teacher / tau).log_softmax(-1))
    assert pair.is_finite
    parts = divergence.summands(pair)
    at_one = divergence.weight_at_one
    slopes = parts.terms + parts.weights - at_one * pair.difference
    p, q = pair.student_probs, pair.teacher_probs
    of_student = p * parts.weights.sum(-1, keepdim=True) - parts.weights
    of_teacher = slopes - q * slopes.sum(-1, keepdim=True)
    return parts.terms.sum(-1), of_student / tau, of_teacher / tau


def by_autograd(divergence: Divergence, student: Tensor, teacher: Tensor):
    leaves = [side.clone().requires_grad_() for side in (student, teacher)]
    value = divergence.value(*(leaf.log_softmax(-1) for leaf in leaves))
    return value.detach(), *torch.autograd.grad(value.sum(), leaves)


@pytest.mark.parametrize("tau", [1.0, 2.5])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 6.0])
def test_summands_give_value_and_both_gradients(case, scale, tau):
    divergence = case.divergence if tau == 1 else Tempered(case.divergence, tau)
    for found, truth in zip(
        by_closed_form(divergence, *logits(scale)),
        by_autograd(divergence, *logits(scale)),
        strict=True,
    ):
        torch.testing.assert_close(found, truth, rtol=1e-8, atol=1e-12)


def test_summands_are_the_definition(case):
    student, teacher = (side.log_softmax(-1) for side in logits(1.0))
    parts = case.divergence.summands(LogProbPair(student, teacher))
    log_ratio = teacher - student
    p = student.exp()
    torch.testing.assert_close(parts.terms, p * case.divergence.generator(log_ratio))
    torch.testing.assert_close(parts.weights, p * case.divergence.centred_weight(log_ratio))
    assert case.divergence.weight_at_one == float(case.divergence.weight(torch.zeros(1).double()))


@pytest.mark.parametrize("extreme", [(-120.0, -1.0), (-1.0, -120.0), (-60.0, -150.0)], ids=str)
def test_float32_agrees_with_float64_where_probabilities_underflow(case, extreme):
    first, second = ([x, math.log1p(-math.exp(x))] for x in extreme)
    student, teacher = torch.tensor([first]), torch.tensor([second])
    truth = by_autograd(case.divergence, student.double(), teacher.double())
    if not all((side.abs() < 1e30).all() for side in truth):
        return
    for found, expected in zip(
        by_closed_form(case.divergence, student, teacher), truth, strict=True
    ):
        largest = max(expected.abs().max().item(), 1e-3)
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=3e-7 + 1e-4 * largest)


def test_float32_near_equality_is_at_rounding(case):
    student, teacher = logits(1e-3, torch.float32)
    truth = by_autograd(case.divergence, student.double(), teacher.double())
    for found, expected in zip(
        by_closed_form(case.divergence, student, teacher), truth, strict=True
    ):
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=3e-6)


def test_an_id_that_is_ruled_out_is_noticed():
    plain = torch.zeros(1, 3).log_softmax(-1)
    for spoilt in (-math.inf, math.nan):
        other = torch.tensor([[0.0, 0.0, spoilt]])
        assert LogProbPair(plain, plain).is_finite
        assert not LogProbPair(plain, other).is_finite
        assert not LogProbPair(other, plain).is_finite
        assert not LogProbPair(other, other).is_finite


class Wrapped(Divergence):
    """Changes the distributions in its own way."""

    def generator(self, log_ratio):
        return -log_ratio

    def value(self, student_logprobs, teacher_logprobs):
        return (teacher_logprobs - student_logprobs).amax(-1)


def test_temperature_is_known_where_value_is_the_usual_one():
    assert ForwardKL().softmax_temperature == 1
    assert Tempered(Tempered(ForwardKL(), 2.0), 3.0).softmax_temperature == 6
    assert Wrapped().softmax_temperature is None
    assert Tempered(Wrapped(), 2.0).softmax_temperature is None


class Merging(TopK):
    """Merges ids in its own way."""

    def outcome_ids(self, student_logprobs, teacher_logprobs):
        return student_logprobs.topk(2).indices


def test_classes_that_merge_ids_are_known_through_wrappers_too():
    assert Merging(ForwardKL(), 1).merges_ids
    assert TopK(ForwardKL(), 1).merges_ids
    assert Tempered(TopK(ForwardKL(), 1), 2.0).merges_ids
    assert not ForwardKL().merges_ids
    assert not Tempered(ForwardKL(), 2.0).merges_ids
    assert not Wrapped().merges_ids
