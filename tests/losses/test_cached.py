"""A teacher of whom k ids and the rest are known.

Frozen here: value and gradient are those of TopK on the full distributions, for every divergence,
at every k up to the vocabulary, with ids that are ruled out and with a rest of next to nothing;
fewer ids than are known can be asked for; agreement and the log-probability of a sampled token are
exact; a baseline depends on the state alone; what needs more is refused.
"""

from __future__ import annotations

import math

import pytest
import torch
from divergence_cases import CASES, Case

from okd_lightning.divergences import ForwardKL, JensenShannon, ReverseKL, Tempered, TopK
from okd_lightning.errors import ConfigError
from okd_lightning.losses import (
    Agreement,
    CachedAgreement,
    CachedDivergence,
    DrawnLogProb,
    DrawnOutcome,
    Entropy,
    ExactDivergence,
    ExpectedWeight,
    TeacherShift,
    Tile,
    cached_form,
    pack_outcomes,
)

VOCAB = 13
TARGETS = torch.zeros(6, dtype=torch.int64)


@pytest.fixture
def logits() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    student, teacher = 3 * torch.randn(2, 6, VOCAB, generator=generator, dtype=torch.float64)
    student[:, 5] = teacher[:, 5] = -math.inf  # an id that no token has
    return student, teacher


def packed(teacher: torch.Tensor, k: int, targets: torch.Tensor | None = None) -> torch.Tensor:
    logprobs = teacher.log_softmax(-1)
    top = logprobs.topk(k, -1)
    rest = logprobs.scatter(-1, top.indices, -math.inf).logsumexp(-1, keepdim=True)
    drawn = None if targets is None else logprobs.gather(-1, targets[:, None])[:, 0]
    return pack_outcomes(top.indices, torch.cat([top.values, rest], -1), drawn)


def both(divergence, k: int, known: int, student, teacher):
    """(values, gradient in the logits) from packed rows and from full ones."""
    found = []
    for quantity, rows in (
        (CachedDivergence(divergence, k), packed(teacher, known)),
        (ExactDivergence(TopK(divergence, k)), teacher),
    ):
        leaf = student.clone().requires_grad_()
        values = quantity.measure(Tile(leaf, rows, TARGETS))
        weights = torch.arange(1.0, 7.0, dtype=leaf.dtype)
        found.append((values, *torch.autograd.grad((weights * values).sum(), leaf)))
    return found


@pytest.mark.parametrize("k", [1, 4, VOCAB - 1, VOCAB])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_it_is_top_k_of_the_full_distributions(case: Case, k, logits):
    (values, gradient), (expected, wanted) = both(case.divergence, k, k, *logits)
    torch.testing.assert_close(values, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient, wanted, rtol=1e-8, atol=1e-11)
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("divergence", [ForwardKL(), ReverseKL(), JensenShannon(0.3)], ids=repr)
def test_fewer_ids_than_are_known(divergence, logits):
    (values, gradient), (expected, wanted) = both(divergence, 3, 8, *logits)
    torch.testing.assert_close(values, expected)
    torch.testing.assert_close(gradient, wanted)


def test_a_rest_that_the_student_all_but_rules_out(logits):
    """exp(-rest) alone would leave float32's range."""
    student, teacher = (side.float() for side in logits)
    top = teacher.topk(4, -1).indices
    student = student - 100 + torch.zeros_like(student).scatter(-1, top, 100.0)
    (values, gradient), (expected, wanted) = both(ForwardKL(), 4, 4, student, teacher)
    torch.testing.assert_close(values, expected)
    torch.testing.assert_close(gradient, wanted)
    assert gradient.isfinite().all()


def test_agreement_is_exact(logits):
    student, teacher = logits
    student[:3] = teacher[:3]
    found = CachedAgreement().measure(Tile(student, packed(teacher, 2), TARGETS))
    expected = Agreement().measure(Tile(student, teacher, TARGETS))
    assert found.tolist() == expected.tolist()
    assert 0 < found.sum() < 6


@pytest.mark.parametrize("target", [0, 3, VOCAB - 1])
@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_sampled_token_is_known_exactly(role, target, logits):
    """The token's own log-probability is exact, and that of its outcome."""
    student, teacher = logits
    targets = torch.full((6,), target)
    full = Tile(student, teacher, targets)
    known = Tile(student, packed(teacher, 4, targets), targets)
    for asked in (JensenShannon(0.3), TopK(JensenShannon(0.3), 4), TopK(ReverseKL(), 2)):
        exact = DrawnOutcome(role, asked)
        found = cached_form(exact, 4, VOCAB).measure(known)
        torch.testing.assert_close(found, exact.measure(full), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_its_baseline_is_a_states_and_with_all_ids_the_exact_one(case: Case, logits):
    student, teacher = logits
    for k in (2, VOCAB - 1):
        exact = ExpectedWeight(case.divergence, 3.0)
        means = [
            cached_form(exact, k, VOCAB).measure(
                Tile(student, packed(teacher, k, targets), targets)
            )
            for targets in (TARGETS, TARGETS + 3)
        ]
        assert torch.equal(*means)
        merged = ExpectedWeight(TopK(case.divergence, k), 3.0)
        expected = merged.measure(Tile(student, teacher, TARGETS))
        torch.testing.assert_close(means[0], expected, rtol=1e-9, atol=1e-12)
        assert cached_form(merged, k, VOCAB) == cached_form(exact, k, VOCAB)
    torch.testing.assert_close(means[0], exact.measure(Tile(student, teacher, TARGETS)))


def test_what_is_read_as_what():
    kl = ForwardKL()
    assert cached_form(ExactDivergence(kl), 4, VOCAB) == CachedDivergence(kl, 4)
    assert cached_form(ExactDivergence(kl), 99, VOCAB) == CachedDivergence(kl, VOCAB)
    assert cached_form(ExactDivergence(TopK(kl, 3)), 4, VOCAB) == CachedDivergence(kl, 3)
    assert cached_form(ExactDivergence(TopK(kl, 99)), 99, VOCAB) == CachedDivergence(kl, VOCAB)
    assert cached_form(Agreement(), 4, VOCAB) == CachedAgreement()
    drawn = cached_form(DrawnOutcome("teacher", kl), 4, VOCAB)
    for own in (DrawnLogProb(), Entropy(), CachedDivergence(kl, 2), drawn):
        assert cached_form(own, 4, VOCAB) is own


@pytest.mark.parametrize(
    ("quantity", "words"),
    [
        (ExactDivergence(Tempered(ForwardKL(), 2.0)), "temperature is 2"),
        (ExactDivergence(TopK(ForwardKL(), 5)), "takes 5 ids, and 4 are known"),
        (ExactDivergence(TopK(ForwardKL(), 3, "student")), "student's most likely ids"),
        (ExactDivergence(ForwardKL(), learner="teacher"), "ExactDivergence"),
        (DrawnOutcome("teacher", Tempered(ForwardKL(), 2.0)), "temperature is 2"),
        (ExpectedWeight(TopK(ForwardKL(), 5)), "takes 5 ids, and 4 are known"),
        (DrawnLogProb("teacher"), "DrawnLogProb"),
        (Entropy("teacher"), "Entropy"),
        (TeacherShift(), "TeacherShift"),
    ],
    ids=repr,
)
def test_what_needs_more_is_refused(quantity, words):
    with pytest.raises(ConfigError, match=words):
        cached_form(quantity, 4, VOCAB)
