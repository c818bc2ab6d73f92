"""Values of all divergences.

Frozen here: agreement with 50-digit arithmetic in float64 and, for log-ratios up to 200 nats, in
float32; f(1) = 0, convexity, D >= 0, D(p, p) = 0; the declared symmetry and bound; an id that is
-inf on one side costs the limit of f, on both sides nothing; an infinite divergence is +inf and
never NaN; half precision is widened; a NaN is not hidden.
"""

from __future__ import annotations

import math

import divergence_reference as reference
import pytest
import torch
from divergence_cases import CASES, INF, Case

NEG = -math.inf


@pytest.fixture(params=CASES, ids=lambda case: case.id)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def pairs(*, rows: int = 3, vocab: int = 7, scale: float = 2.0, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(2, rows, vocab, generator=generator, dtype=torch.float64)
    return tuple(torch.log_softmax(logits, dim=-1))


def expected(case: Case, student: torch.Tensor, teacher: torch.Tensor) -> list[float]:
    rows = zip(student.tolist(), teacher.tolist(), strict=True)
    return [
        float(reference.divergence_with_zeros(case.f, case.at_zero, case.at_infinity, p, q))
        for p, q in rows
    ]


@pytest.mark.parametrize("scale", [1e-3, 2.0, 20.0])
def test_value_agrees_with_the_definition(case, scale):
    student, teacher = pairs(scale=scale)
    value = case.divergence.value(student, teacher)
    truth = torch.tensor(expected(case, student, teacher), dtype=torch.float64)
    torch.testing.assert_close(value, truth, rtol=1e-9, atol=1e-13)


# log p and log q of the first id; the second carries what is left. |log-ratio| up to 200.
EXTREMES = [
    (-120.0, -1.0),
    (-1.0, -120.0),
    (-200.0, -0.01),
    (-0.01, -200.0),
    (-60.0, -150.0),
    (-150.0, -60.0),
    (-88.0, -30.0),
    (-30.0, -88.0),
    (-150.0, -150.0),
]


@pytest.mark.parametrize("extreme", EXTREMES, ids=str)
def test_float32_agrees_with_the_truth_up_to_200_nats(case, extreme):
    logprobs = torch.tensor([[first, math.log1p(-math.exp(first))] for first in extreme])
    student, teacher = logprobs[:1].clone().requires_grad_(), logprobs[1:].clone().requires_grad_()
    value = case.divergence.value(student, teacher)
    assert value.dtype == torch.float32
    truth = float(reference.divergence(case.f, student[0].tolist(), teacher[0].tolist()))
    if truth > torch.finfo(torch.float32).max:
        assert value.item() == INF
        return
    assert value.item() == pytest.approx(truth, rel=1e-4, abs=1e-7)
    if truth > 1e30:
        return  # the gradient may exceed float32 where the value is close to doing so
    narrow = torch.autograd.grad(value.sum(), (student, teacher))
    wide_inputs = student.detach().double(), teacher.detach().double()
    for tensor in wide_inputs:
        tensor.requires_grad_()
    wide = torch.autograd.grad(case.divergence.value(*wide_inputs).sum(), wide_inputs)
    for got, truth_gradient in zip(narrow, wide, strict=True):
        largest = max(truth_gradient.abs().max().item(), 1e-3)
        torch.testing.assert_close(got.double(), truth_gradient, rtol=1e-3, atol=1e-4 * largest)


def test_float32_agrees_with_float64_on_wide_logits(case):
    student, teacher = pairs(scale=25.0, vocab=50)
    assert (teacher - student).abs().max() > 60
    student, teacher = student.float(), teacher.float()
    truth = case.divergence.value(student.double(), teacher.double())
    torch.testing.assert_close(
        case.divergence.value(student, teacher), truth.float(), rtol=1e-4, atol=1e-6
    )


def test_generator_is_zero_at_one_and_convex(case):
    u = torch.logspace(-4, 4, 60, dtype=torch.float64)
    f = case.divergence.generator
    assert f(torch.zeros(1, dtype=torch.float64)).abs().item() < 1e-12
    low, high = u[:-1], u[1:]
    middle, chord = f(((low + high) / 2).log()), (f(low.log()) + f(high.log())) / 2
    assert (middle <= chord + 1e-9 * chord.abs() + 1e-12).all()


def test_never_negative_and_zero_for_equal_distributions(case):
    student, teacher = pairs(rows=50)
    assert (case.divergence.value(student, teacher) > 0).all()
    logits = student.clone().requires_grad_()
    same = case.divergence.value(
        torch.log_softmax(logits, -1), torch.log_softmax(logits, -1).detach()
    )
    assert same.abs().max().item() < 1e-12
    assert torch.autograd.grad(same.sum(), logits)[0].abs().max().item() < 1e-12


def test_symmetry_is_as_declared(case):
    student, teacher = pairs()
    forth, back = case.divergence.value(student, teacher), case.divergence.value(teacher, student)
    assert case.divergence.is_symmetric == case.is_symmetric
    assert torch.allclose(forth, back, rtol=1e-6) == case.is_symmetric


def test_upper_bound_is_reached_by_disjoint_supports_and_not_exceeded(case):
    student, teacher = torch.tensor([[0.0, NEG]]), torch.tensor([[NEG, 0.0]])
    disjoint = case.divergence.value(student, teacher).item()
    bound = case.at_zero + case.at_infinity
    if math.isinf(bound):
        assert case.divergence.upper_bound is None
        assert disjoint == INF
        return
    assert case.divergence.upper_bound == pytest.approx(bound, rel=1e-6)
    assert disjoint == pytest.approx(bound, rel=1e-6)
    assert (case.divergence.value(*pairs(rows=50, scale=30.0)) <= bound * (1 + 1e-9)).all()


def test_limits_are_the_textbook_ones(case):
    assert case.divergence.limit_at_zero == pytest.approx(case.at_zero, rel=1e-6)
    assert case.divergence.limit_at_infinity == pytest.approx(case.at_infinity, rel=1e-6)


MASKED = {
    "teacher rules out an id": ([0.0, 1.0, 2.0, 3.0], [1.0, NEG, 0.5, 0.0]),
    "student rules out an id": ([0.0, NEG, 2.0, 3.0], [1.0, 0.0, 0.5, 0.0]),
    "both rule out an id": ([0.0, NEG, 2.0, 3.0], [1.0, NEG, 0.5, 0.0]),
    "each rules out another": ([NEG, 0.0, 2.0, 3.0], [1.0, NEG, 0.5, 0.0]),
    "one id is left to the teacher": ([0.0, 1.0, 2.0, 3.0], [NEG, 0.0, NEG, NEG]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("logits", MASKED.values(), ids=MASKED.keys())
def test_excluded_ids_give_the_limit_and_no_nan(case, logits, dtype):
    student, teacher = (torch.tensor([row], dtype=dtype, requires_grad=True) for row in logits)
    log_p, log_q = torch.log_softmax(student, -1), torch.log_softmax(teacher, -1)
    value = case.divergence.value(log_p, log_q)
    assert value.item() == pytest.approx(expected(case, log_p, log_q)[0], rel=1e-5, abs=1e-8)
    if value.isfinite():
        gradients = torch.autograd.grad(value.sum(), (student, teacher))
        for gradient, tensor in zip(gradients, (student, teacher), strict=True):
            assert gradient.isfinite().all()
            assert (gradient[tensor == NEG] == 0).all()


def test_ids_that_both_sides_exclude_change_nothing(case):
    logits = torch.randn(2, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    padding = torch.full((2, 4, 3), NEG, dtype=torch.float64)
    padded = torch.cat([logits, padding], dim=-1)
    logits.requires_grad_()
    padded.requires_grad_()
    gradients = []
    for tensor in (logits, padded):
        values = case.divergence.value(*torch.log_softmax(tensor, dim=-1))
        gradients.append(torch.autograd.grad(values.sum(), tensor)[0])
    torch.testing.assert_close(gradients[1][..., :6], gradients[0])
    assert (gradients[1][..., 6:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_widened_to_float32(case, dtype):
    student, teacher = (side.to(dtype) for side in pairs())
    value = case.divergence.value(student, teacher)
    assert value.dtype == torch.float32
    assert torch.equal(value, case.divergence.value(student.float(), teacher.float()))


def test_nan_is_not_hidden(case):
    student, teacher = pairs()
    teacher[1, 2] = math.nan
    assert case.divergence.value(student, teacher).isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("case", [c for c in CASES if c.is_built_in], ids=lambda case: case.id)
def test_a_ratio_of_zero_is_no_nan_for_sampled_tokens(case):
    """The student drew what the teacher rules out: u = 0, and f(u) is its limit."""
    never = torch.tensor([NEG])
    assert case.divergence.generator(never).item() == pytest.approx(case.at_zero, rel=1e-5)
    assert not case.divergence.weight(never).isnan().any()
