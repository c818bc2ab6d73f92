"""Effect of a temperature on a divergence.

Frozen here: Tempered is tau^2 D(softmax(z/tau)), in value and in gradient, of log-probabilities at
temperature 1; its weight is that of the tempered distributions; two temperatures multiply.
"""

from __future__ import annotations

import math

import pytest
import torch
from divergence_cases import CASES, Case

from okd_lightning.divergences import ForwardKL, JensenShannon, ReverseKL, Tempered


@pytest.fixture
def logits() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    return tuple(2 * torch.randn(2, 3, 8, generator=generator, dtype=torch.float64))


def value_and_gradients(divergence, logits, temperature=1.0):
    leaves = [side.clone().requires_grad_() for side in logits]
    value = divergence.value(*(torch.log_softmax(leaf / temperature, -1) for leaf in leaves))
    return value, *torch.autograd.grad(value.sum(), leaves)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_value_and_both_gradients_are_those_of_tempered_softmaxes(case: Case, logits, temperature):
    tempered = value_and_gradients(Tempered(case.divergence, temperature), logits)
    direct = value_and_gradients(case.divergence, logits, temperature)
    for got, inner in zip(tempered, direct, strict=True):
        torch.testing.assert_close(got, temperature**2 * inner, rtol=1e-7, atol=1e-11)


@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_gradient_of_forward_kl_is_tau_times_the_difference(logits, temperature):
    _, gradient, _ = value_and_gradients(Tempered(ForwardKL(), temperature), logits)
    p, q = (torch.softmax(side / temperature, -1) for side in logits)
    torch.testing.assert_close(gradient, temperature * (p - q))


def test_weight_is_that_of_the_tempered_distributions(logits):
    tempered = Tempered(JensenShannon(0.25), 3.0)
    student = logits[0].clone().requires_grad_()
    log_p, log_q = torch.log_softmax(student / 3.0, -1), torch.log_softmax(logits[1] / 3.0, -1)
    weight = tempered.weight((log_q - log_p).detach())
    surrogate = -(log_p.detach().exp() * weight * log_p).sum()
    by_weight = torch.autograd.grad(surrogate, student)[0]
    torch.testing.assert_close(by_weight, value_and_gradients(tempered, logits)[1])


def test_two_temperatures_multiply(logits):
    log_p, log_q = (torch.log_softmax(side, -1) for side in logits)
    twice = Tempered(Tempered(ReverseKL(), 2.0), 3.0)
    torch.testing.assert_close(
        twice.value(log_p, log_q), Tempered(ReverseKL(), 6.0).value(log_p, log_q)
    )


def test_bound_scales_and_excluded_ids_stay_excluded():
    tempered = Tempered(JensenShannon(0.5), 2.0)
    assert tempered.upper_bound == pytest.approx(4 * math.log(2))
    assert tempered.is_symmetric
    student = torch.tensor([[0.0, 1.0, -math.inf, -math.inf]], requires_grad=True)
    teacher = torch.tensor([[-math.inf, 1.0, 0.0, -math.inf]])
    value = tempered.value(torch.log_softmax(student, -1), torch.log_softmax(teacher, -1))
    gradient = torch.autograd.grad(value.sum(), student)[0]
    assert value.isfinite().all()
    assert gradient.isfinite().all()
    assert gradient[0, 2:].tolist() == [0.0, 0.0]
