"""The weight w_f of all divergences, and its expected gradient.

Frozen here: the gradient of sum_a p f(u) is -E_p[w_f grad log p] on the student's side and
q (f' - E_q f') in the teacher's logits; a closed form of w_f is its definition; w_f ignores how f
is written (up to a constant) and -f does not; for reverse KL, and not for forward KL, -f will do.
"""

from __future__ import annotations

from dataclasses import dataclass

import mpmath
import pytest
import torch
from divergence_cases import CASES, Case, PlainForwardKL, Triangular
from torch import Tensor

from okd_lightning.divergences import Divergence, ForwardKL, ReverseKL


@pytest.fixture(params=CASES, ids=lambda case: case.id)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture
def logits() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(2, 3, 6, generator=generator, dtype=torch.float64))


@dataclass(frozen=True)
class Shifted(Divergence):
    """f + c (u - 1): the same divergence, written in another way."""

    inner: Divergence
    c: float

    def generator(self, log_ratio: Tensor) -> Tensor:
        return self.inner.generator(log_ratio) + self.c * log_ratio.expm1()


def derivative(case: Case, log_ratio: Tensor) -> Tensor:
    """f'(u) by 50-digit numerical differentiation in u."""
    values = [float(mpmath.diff(case.f, mpmath.exp(x))) for x in log_ratio.flatten().tolist()]
    return torch.tensor(values, dtype=torch.float64).reshape(log_ratio.shape)


def policy_gradient(advantage: Tensor, student: Tensor) -> Tensor:
    """The gradient in the student's logits of -E_{a~p}[A(a) log p(a)], A and the sampler fixed."""
    leaf = student.detach().clone().requires_grad_()
    log_p = torch.log_softmax(leaf, dim=-1)
    loss = -(log_p.detach().exp() * advantage.detach() * log_p).sum()
    return torch.autograd.grad(loss, leaf)[0]


def log_ratios(student: Tensor, teacher: Tensor) -> Tensor:
    return torch.log_softmax(teacher, -1) - torch.log_softmax(student, -1)


def test_exact_gradient_is_the_weighted_score_and_its_counterpart(case, logits):
    student, teacher = (side.clone().requires_grad_() for side in logits)
    value = case.divergence.value(torch.log_softmax(student, -1), torch.log_softmax(teacher, -1))
    student_gradient, teacher_gradient = torch.autograd.grad(value.sum(), (student, teacher))

    log_ratio = log_ratios(*logits)
    weighted = policy_gradient(case.divergence.weight(log_ratio), logits[0])
    torch.testing.assert_close(student_gradient, weighted, rtol=1e-6, atol=1e-10)

    q, slope = torch.softmax(logits[1], -1), derivative(case, log_ratio)
    by_hand = q * (slope - (q * slope).sum(-1, keepdim=True))
    torch.testing.assert_close(teacher_gradient, by_hand, rtol=1e-6, atol=1e-10)


def test_weight_is_its_definition_and_what_autograd_finds(case):
    log_ratio = torch.linspace(-8, 8, 21, dtype=torch.float64)[[*range(10), *range(11, 21)]]
    f = torch.tensor(
        [float(case.f(mpmath.exp(x))) for x in log_ratio.tolist()], dtype=torch.float64
    )
    definition = derivative(case, log_ratio) * log_ratio.exp() - f
    weight = case.divergence.weight(log_ratio)
    torch.testing.assert_close(
        weight, Divergence.weight(case.divergence, log_ratio), rtol=1e-6, atol=1e-9
    )
    torch.testing.assert_close(weight, definition, rtol=1e-6, atol=1e-9)


def test_centred_weight_is_zero_where_both_agree(case):
    log_ratio = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)
    weight, centred = case.divergence.weight(log_ratio), case.divergence.centred_weight(log_ratio)
    assert centred[1].item() == 0.0
    torch.testing.assert_close(centred, weight - weight[1])


def test_value_with_generator_alone_equals_the_closed_form(case, logits):
    log_p, log_q = (torch.log_softmax(side, -1) for side in logits)
    derived = Shifted(case.divergence, 0.0).value(log_p, log_q)
    torch.testing.assert_close(derived, case.divergence.value(log_p, log_q), rtol=1e-9, atol=1e-12)


def test_weight_ignores_how_f_is_written_and_minus_f_does_not(case, logits):
    student, log_ratio, c = logits[0], log_ratios(*logits), 0.7
    shifted = Shifted(case.divergence, c)
    weight = case.divergence.weight(log_ratio)
    torch.testing.assert_close(shifted.weight(log_ratio), weight + c, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(
        policy_gradient(shifted.weight(log_ratio), student),
        policy_gradient(weight, student),
        rtol=1e-6,
        atol=1e-10,
    )
    plain, moved = (
        policy_gradient(-f.generator(log_ratio), student) for f in (case.divergence, shifted)
    )
    difference = torch.softmax(logits[1], -1) - torch.softmax(student, -1)
    torch.testing.assert_close(moved - plain, c * difference)
    assert (moved - plain).abs().max() > 0.01


def test_minus_f_serves_reverse_kl_and_misleads_forward_kl(logits):
    log_ratio = log_ratios(*logits)
    reverse, forward = (
        (
            policy_gradient(-f.generator(log_ratio), logits[0]).flatten(),
            policy_gradient(f.weight(log_ratio), logits[0]).flatten(),
        )
        for f in (ReverseKL(), ForwardKL())
    )
    torch.testing.assert_close(*reverse)
    assert torch.cosine_similarity(*forward, dim=0) < -0.5


@pytest.mark.parametrize("divergence", [Triangular(), PlainForwardKL()], ids=repr)
def test_derived_weight_works_in_inference_mode(divergence):
    log_ratio = torch.tensor([-2.0, 0.5])
    outside = divergence.weight(log_ratio)
    with torch.inference_mode():
        inside = divergence.weight(torch.tensor([-2.0, 0.5]))
    assert torch.equal(outside, inside)
    assert not outside.requires_grad


def test_the_docstrings_subclass_works_as_printed():
    lines = Divergence.__doc__.splitlines()
    start = next(i for i, line in enumerate(lines) if "@dataclass" in line)
    stop = next(i for i in range(start, len(lines)) if "return" in lines[i]) + 1
    indent = len(lines[start]) - len(lines[start].lstrip())
    namespace = {"dataclass": dataclass, "Divergence": Divergence, "Tensor": Tensor}
    source = "\n".join(line[indent:] for line in lines[start:stop])
    assert stop - start <= 10
    exec(compile(source, "<docstring>", "exec", dont_inherit=True), namespace)
    triangular = namespace["Triangular"]()
    p, q = torch.tensor([[0.2, 0.8]]), torch.tensor([[0.5, 0.5]])
    truth = ((p - q) ** 2 / (p + q)).sum(-1)
    torch.testing.assert_close(triangular.value(p.log(), q.log()), truth)
    assert triangular.upper_bound == pytest.approx(2.0)
