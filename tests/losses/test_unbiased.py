"""Bias by enumeration: every response of a tabular student, with its probability, in float64.

Frozen here: the expected gradient of a step of 1, 2 and 3 rollouts is that of the objective, to
rounding, for OPD+ with every divergence, every variant and discount 0 and 1, for OPD with reverse
KL and for the exact loss, where sampled rows are divided by their number times a mean that they do
not decide; at discount 0 the objective is the expected sum of divergences along fixed prefixes, at
1 that of the whole response; with token_mean it is not (the ratio estimator that is the option).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from divergence_cases import CASES
from torch import Tensor

from okd_lightning.callbacks import GKD, OPD, OPDPlus
from okd_lightning.divergences import Divergence, ForwardKL, JensenShannon, ReverseKL, TopK
from okd_lightning.losses import Measured, Tile
from okd_lightning.losses.reduction import Normalization
from okd_lightning.records.batches import DistillBatch, SampledCounts, TrainingRow
from okd_lightning.records.collation import collate

NUM_IDS, END, LONGEST = 3, 2, 3
MEAN = 1.7
"""Loss tokens per rollout of earlier batches: any number that these responses do not decide."""

_LIMITS = ("1e-", "0.9999", "0.0001", "beta=0.0,", "beta=1.0,")  # others represent these
DIVERGENCES = [case.divergence for case in CASES if not any(end in case.id for end in _LIMITS)]
DIVERGENCES += [TopK(ForwardKL(), 1), TopK(ReverseKL(), 2)]


def all_states() -> list[tuple[int, ...]]:
    """Return every prefix that has not ended."""
    return [
        prefix
        for length in range(LONGEST)
        for prefix in itertools.product(range(END), repeat=length)
    ]


STATES = all_states()
RESPONSES = [
    (*prefix, last)
    for prefix in STATES
    for last in range(NUM_IDS)
    if last == END or len(prefix) == LONGEST - 1
]


class Student:
    """Tabular models: one row of logits per prefix."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(4)
        shape = len(STATES), NUM_IDS
        self.logits = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        self.teacher = self.logits.detach() + 0.7 * noise

    def places(self, response: tuple[int, ...]) -> list[int]:
        return [STATES.index(response[:n]) for n in range(len(response))]

    def log_probability(self, response: tuple[int, ...]) -> Tensor:
        return self.logits.log_softmax(-1)[self.places(response), list(response)].sum()

    def chance(self, response: tuple[int, ...]) -> float:
        return math.exp(self.log_probability(response).item())

    def reach(self) -> Tensor:
        """[states] the probability of each prefix, with gradient."""
        return torch.stack([self.log_probability(prefix).exp() for prefix in STATES])

    def objective(self, divergence: Divergence, discount: int) -> Tensor:
        """Σ P(prefix) D(prefix); for discount 0 the prefixes' probabilities are constants."""
        values = divergence.value(self.logits.log_softmax(-1), self.teacher.log_softmax(-1))
        reach = self.reach()
        return ((reach if discount else reach.detach()) * values).sum()

    def gradient_of(self, method, response: tuple[int, ...]) -> Tensor:
        """Return the gradient of the method's sum over one sampled response."""
        places, targets = self.places(response), torch.tensor(response)
        tile = Tile(self.logits[places], self.teacher[places], targets)
        ones, rows = torch.ones_like(targets), torch.zeros_like(targets)
        own = self.logits.detach().log_softmax(-1)[places, list(response)]
        values = {quantity: quantity.measure(tile) for quantity in method.quantities}
        total = method.loss(Measured(values, ones, rows, own)).sum
        return torch.autograd.grad(total, self.logits)[0]


def stamped(responses: tuple[tuple[int, ...], ...]) -> DistillBatch:
    """A batch of sampled responses, as the loader stamps it."""
    rows = [
        TrainingRow(0, "student", (0, *ids), (False,) + (True,) * len(ids), 1) for ids in responses
    ]
    counts = (0, sum(map(len, responses)), 0)
    return replace(
        collate(rows), step_counts=counts, sampled=SampledCounts(len(responses), MEAN, LONGEST)
    )


def expected_step(method, student: Student, rollouts: int, normalization: Normalization) -> Tensor:
    """The mean over all steps of so many rollouts, weighted by their probability."""
    gradients = [student.gradient_of(method, response) for response in RESPONSES]
    chances = [student.chance(response) for response in RESPONSES]
    assert sum(chances) == pytest.approx(1)
    total = torch.zeros_like(student.logits)
    for chosen in itertools.product(range(len(RESPONSES)), repeat=rollouts):
        batch = stamped(tuple(RESPONSES[i] for i in chosen))
        divisor = normalization.divisor(batch, method.sources)
        chance = math.prod(chances[i] for i in chosen)
        total += chance / divisor * torch.stack([gradients[i] for i in chosen]).sum(0)
    return total.detach()


def check_unbiased(method, divergence: Divergence, discount: int = 0, rollouts: int = 1) -> None:
    student = Student()
    (truth,) = torch.autograd.grad(student.objective(divergence, discount), student.logits)
    found = expected_step(method, student, rollouts, Normalization())
    torch.testing.assert_close(found * MEAN, truth, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("discount", [0, 1])
@pytest.mark.parametrize("variant", ["as_published", "centred", "value_baseline"])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
def test_opd_plus_is_the_gradient_of_its_objective(divergence, variant, discount):
    check_unbiased(OPDPlus(divergence, variant, float(discount)), divergence, discount)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
def test_the_exact_loss_is_the_gradient_of_its_objective(divergence):
    check_unbiased(GKD(divergence=divergence, on_policy_fraction=1.0), divergence)


@pytest.mark.parametrize("discount", [0, 1])
def test_opd_with_reverse_kl_is_too(discount):
    check_unbiased(OPD(discount=float(discount)), ReverseKL(), discount)


METHODS = {
    "as published": (OPDPlus(variant="as_published"), ReverseKL()),
    "a value": (OPDPlus(JensenShannon(0.5)), JensenShannon(0.5)),
    "exact": (GKD(divergence=ForwardKL(), on_policy_fraction=1.0), ForwardKL()),
}


@pytest.mark.parametrize("name", METHODS)
def test_more_rollouts_a_step_change_nothing(name):
    check_unbiased(*METHODS[name], rollouts=2)


@pytest.mark.parametrize("by", ["running_mean", "constant", 5])
def test_every_divisor_but_the_tokens_is_free_of_bias(by):
    """Two rollouts per step; the divisor's scale is all that differs."""
    student, (method, divergence) = Student(), METHODS["as published"]
    (truth,) = torch.autograd.grad(student.objective(divergence, 0), student.logits)
    found = expected_step(method, student, 2, Normalization(by))
    scale = {"running_mean": MEAN, "constant": LONGEST}.get(by, by)
    torch.testing.assert_close(found * scale, truth, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", METHODS)
def test_dividing_by_the_sampled_tokens_is_a_ratio_estimator(name):
    student, (method, divergence) = Student(), METHODS[name]
    (truth,) = torch.autograd.grad(student.objective(divergence, 0), student.logits)
    mean_length = float(student.reach().detach().sum())
    off = [
        float(
            (
                expected_step(method, student, n, Normalization("token_mean")) * mean_length - truth
            ).norm()
        )
        / float(truth.norm())
        for n in (1, 2)
    ]
    assert off[0] > 1.3 * off[1] > 0.02
