"""Quantities of methods, against sums written out in float64.

Frozen here: every quantity's value; gradient flows to the learner alone and never to the other
side, and is that of the written-out sum; a token that a vocabulary gap or a confident model rules
out spoils no gradient; quantities are equal by what they are, so that two methods share one
computation.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import reference_loss as reference
import torch
from torch import Tensor

from okd_lightning.divergences import (
    ForwardKL,
    JensenShannon,
    ReverseKL,
    SkewForwardKL,
    TotalVariation,
)
from okd_lightning.losses import (
    Agreement,
    DrawnLogProb,
    Entropy,
    ExactDivergence,
    Quantity,
    Tile,
    measure,
)

DIVERGENCES = {
    ForwardKL(): lambda p, q: reference.kl(q, p),
    ReverseKL(): reference.kl,
    JensenShannon(0.5): lambda p, q: reference.jsd(p, q, 0.5),
    JensenShannon(0.25): lambda p, q: reference.jsd(p, q, 0.25),
    SkewForwardKL(0.1): lambda p, q: reference.skew_forward(p, q, 0.1),
    TotalVariation(): lambda p, q: (p.exp() - q.exp()).abs().sum(-1) / 2,
}


def target_logprob(logprobs: Tensor, targets: Tensor) -> Tensor:
    return torch.stack([row[i] for row, i in zip(logprobs, targets, strict=True)])


def entropy(logprobs: Tensor) -> Tensor:
    return -(logprobs.exp() * logprobs).sum(-1)


OTHERS = {
    DrawnLogProb("student"): lambda p, q, y: target_logprob(p, y),
    DrawnLogProb("teacher"): lambda p, q, y: target_logprob(q, y),
    Entropy("student"): lambda p, q, y: entropy(p),
    Entropy("teacher"): lambda p, q, y: entropy(q),
    Agreement(): lambda p, q, y: (p.argmax(-1) == q.argmax(-1)).double(),
}


def run(quantity: Quantity, pair) -> Tensor:
    return measure([quantity], pair.student, pair.teacher, pair.targets, 11)[quantity]


def same(found: Tensor | None, expected: Tensor | None) -> None:
    if expected is None:
        assert found is None or found.count_nonzero() == 0
    else:
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("learner", ["student", "teacher"])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
def test_a_divergence_and_its_gradient(divergence, learner, pair):
    values = run(ExactDivergence(divergence, learner), pair)
    student, teacher = pair.logits()
    if learner == "student":
        teacher = teacher.detach()
    else:
        student = student.detach()
    written_out = DIVERGENCES[divergence](student.log_softmax(-1), teacher.log_softmax(-1))
    torch.testing.assert_close(values, written_out, rtol=1e-9, atol=1e-12)
    found, expected = pair.gradients(values.sum()), pair.gradients(written_out.sum())
    for name in found:
        same(found[name], expected[name])
        assert (found[name] is None) == (not name.startswith(learner))


@pytest.mark.parametrize("quantity", OTHERS, ids=repr)
def test_the_other_quantities(quantity, pair):
    values = run(quantity, pair)
    student, teacher = pair.logits()
    written_out = OTHERS[quantity](
        student.log_softmax(-1), teacher.log_softmax(-1), pair.targets.tolist()
    )
    torch.testing.assert_close(values, written_out, rtol=1e-9, atol=1e-12)
    assert values.requires_grad == written_out.requires_grad
    if values.requires_grad:
        found, expected = pair.gradients(values.sum()), pair.gradients(written_out.sum())
        for name in found:
            same(found[name], expected[name])


@pytest.mark.parametrize("quantity", OTHERS, ids=repr)
def test_only_the_teachers_numbers_need_the_teacher(quantity, pair):
    is_about_teacher = "teacher" in repr(quantity) or isinstance(quantity, Agreement)
    assert quantity.needs_teacher == is_about_teacher
    if not is_about_teacher:
        alone = measure([quantity], pair.student, None, pair.targets, 11)[quantity]
        torch.testing.assert_close(alone, run(quantity, pair))


ALL = [*(ExactDivergence(d) for d in DIVERGENCES), *OTHERS]


@pytest.mark.parametrize("quantity", ALL, ids=repr)
@pytest.mark.parametrize("spoilt", ["gap on both sides", "student is certain"])
def test_ids_without_probability_spoil_no_value_and_no_gradient(quantity, spoilt):
    student = torch.zeros(2, 4)
    if spoilt == "gap on both sides":
        student[:, 2] = -torch.inf
        teacher = torch.tensor([[0.0, 1.0, -torch.inf, 2.0]]).repeat(2, 1)
    else:  # exp(-200) is 0 in float32
        student[:, 0] = 200.0
        teacher = torch.tensor([[3.0, 1.0, 0.0, 2.0]]).repeat(2, 1)
    student.requires_grad_()
    teacher.requires_grad_()
    values = quantity.measure(Tile(student, teacher, torch.tensor([0, 0])))
    assert values.isfinite().all()
    if values.requires_grad:
        for gradient in torch.autograd.grad(values.sum(), (student, teacher), allow_unused=True):
            assert gradient is None or gradient.isfinite().all()


def test_equal_requests_are_one():
    assert ExactDivergence(ForwardKL()) == ExactDivergence(ForwardKL(), "student")
    assert len({ExactDivergence(ForwardKL()), ExactDivergence(ForwardKL())}) == 1
    assert len({ExactDivergence(ForwardKL()), ExactDivergence(ForwardKL(), "teacher")}) == 2
    assert len({JensenShannon(0.5), JensenShannon(0.25)}) == 2


@dataclass(frozen=True)
class TeacherTopMass(Quantity):
    """The example of the abstract class's docstring."""

    needs_teacher = True

    def measure(self, tile: Tile) -> Tensor:
        return tile.teacher_logprobs.amax(-1).exp()


def test_the_docstrings_own_quantity_is_measured_next_to_the_others(pair):
    wanted = [TeacherTopMass(), ExactDivergence(ForwardKL()), TeacherTopMass()]
    values = measure(wanted, pair.student, pair.teacher, pair.targets, 11)
    assert list(values) == wanted[:2]
    expected = pair.logits()[1].softmax(-1).amax(-1)
    torch.testing.assert_close(values[TeacherTopMass()], expected)
