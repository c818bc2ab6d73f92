"""Gradients where student and teacher are equal, or nearly so, in float32.

Frozen here: identical logits give a value and a gradient of exactly 0 in the closed forms (every
divergence, a user's own included, both learners, any temperature, through a top-k, with ids that
neither side allows), in the fused loss, for a cached teacher, for the online module's shift and for
the value baseline's advantage; autograd through ``value`` gives at most 1e-6 there; at differences
of 1e-3 the error against float64 stays below 1e-3 of the gradient up to 262,144 ids.
"""

from __future__ import annotations

import math

import pytest
import torch
from divergence_cases import CASES, Case
from torch import Tensor

from okd_lightning import DistillationCallback
from okd_lightning.advantages import FDivergenceAdvantage
from okd_lightning.divergences import (
    Divergence,
    ForwardKL,
    JensenShannon,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    Tempered,
    TopK,
)
from okd_lightning.losses import (
    CachedDivergence,
    ExactDivergence,
    Measured,
    ModelRole,
    Side,
    TeacherShift,
    Tile,
    WeightedTerm,
    fused_loss,
    pack_outcomes,
)
from okd_lightning.losses.reduction import loss_output
from okd_lightning.records.batches import LossOutput

NUM_ROWS, NUM_IDS = 3, 501


@pytest.fixture(params=CASES, ids=lambda case: case.id)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def random_logits(num_ids: int = NUM_IDS, rows: int = NUM_ROWS, scale: float = 4.0) -> Tensor:
    return scale * torch.randn(rows, num_ids, generator=torch.Generator().manual_seed(5))


def gradient(divergence: Divergence, learner: ModelRole, student: Tensor, teacher: Tensor):
    """Value and gradient in the learner's logits, as methods ask for them."""
    sides = {"student": student.clone(), "teacher": teacher.clone()}
    leaf = sides[learner].requires_grad_()
    tile = Tile(sides["student"], sides["teacher"], torch.zeros(len(student), dtype=torch.long))
    values = ExactDivergence(divergence, learner).measure(tile)
    return values.detach(), torch.autograd.grad(values.sum(), leaf)[0]


WRAPPED = {
    "plain": lambda divergence: divergence,
    "temperature 0.7": lambda divergence: Tempered(divergence, 0.7),
    "temperature 3": lambda divergence: Tempered(divergence, 3.0),
    "teacher's top 20": lambda divergence: TopK(divergence, 20),
    "tempered student's top 20": lambda divergence: Tempered(TopK(divergence, 20, "student"), 2.0),
}


@pytest.mark.parametrize("gap", [False, True], ids=["", "gap"])
@pytest.mark.parametrize("learner", ["student", "teacher"])
@pytest.mark.parametrize("wrapped", WRAPPED)
def test_identical_logits_have_no_gradient(case, wrapped, learner, gap):
    logits = random_logits()
    if gap:
        logits[:, 7:9] = -math.inf
    value, found = gradient(WRAPPED[wrapped](case.divergence), learner, logits, logits)
    assert value.count_nonzero() == 0
    assert found.count_nonzero() == 0
    assert found.isfinite().all()


def test_autograd_through_value_is_small_there(case):
    logits = random_logits().requires_grad_()
    logprobs = logits.log_softmax(-1)
    for sides in ((logprobs, logprobs.detach()), (logprobs.detach(), logprobs)):
        value = case.divergence.value(*sides).sum()
        (found,) = torch.autograd.grad(value, logits, retain_graph=True)
        assert found.abs().max() <= 1e-6


class Divergent(DistillationCallback):
    """A method that is one divergence, with either learner."""

    sources = ("dataset",)
    on_policy_fraction = 0.0
    quantities = ()

    def __init__(self, divergence: Divergence, learner: ModelRole) -> None:
        super().__init__()
        self.quantities = (ExactDivergence(divergence, learner),)

    def loss(self, measured: Measured) -> LossOutput:
        return loss_output(measured[self.quantities[0]], measured.mask(self.sources))


@pytest.mark.parametrize("learner", ["student", "teacher"])
def test_identical_models_give_the_fused_loss_no_gradient(case, learner):
    generator = torch.Generator().manual_seed(2)
    sides = []
    for _ in range(2):
        generator.manual_seed(2)
        head = torch.nn.Linear(8, 50, bias=False)
        head.weight.data = torch.randn(50, 8, generator=generator)
        hidden = torch.randn(5, 8, generator=generator).requires_grad_()
        sides.append(Side(hidden, head))
    zeros = torch.zeros(5, dtype=torch.long)
    loss = fused_loss(
        [WeightedTerm(Divergent(case.divergence, learner).term, 1.0)],
        *sides,
        zeros,
        Measured({}, zeros, zeros, zeros.float()),
        50,
        2,
    )
    leaves = [tensor for side in sides for tensor in (side.hidden, side.head.weight)]
    for found in torch.autograd.grad(loss.total, leaves, allow_unused=True):
        assert found is None or found.count_nonzero() == 0


@pytest.mark.parametrize("divergence", [ForwardKL(), SkewReverseKL(0.1)], ids=repr)
def test_a_cached_teacher_that_is_the_student_gives_no_gradient(divergence):
    logits = random_logits().requires_grad_()
    with torch.no_grad():
        logprobs = logits.log_softmax(-1)
        top, ids = logprobs.topk(20)
        rest = logprobs.scatter(-1, ids, -math.inf).logsumexp(-1, keepdim=True)
        packed = pack_outcomes(ids, torch.cat([top, rest], -1))
    tile = Tile(logits, packed, torch.zeros(NUM_ROWS, dtype=torch.long))
    values = CachedDivergence(divergence, 20).measure(tile)
    assert torch.autograd.grad(values.sum(), logits)[0].count_nonzero() == 0


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_an_online_module_that_changes_nothing_is_not_anchored(temperature):
    logits = random_logits()
    teacher = logits.clone().requires_grad_()
    tile = Tile(logits, teacher, torch.zeros(NUM_ROWS, dtype=torch.long), logits)
    values = TeacherShift(Tempered(ForwardKL(), temperature), learns=True).measure(tile)
    assert values.count_nonzero() == 0
    assert torch.autograd.grad(values.sum(), teacher)[0].count_nonzero() == 0


@pytest.mark.parametrize("variant", ["centred", "value_baseline"])
def test_centred_advantages_are_zero_where_both_sides_agree(case, variant):
    logprobs = random_logits(rows=1).log_softmax(-1)
    drawn, mask = logprobs[:, :4], torch.ones(1, 4, dtype=torch.bool)
    value = case.divergence.expected_weight(logprobs, logprobs)[:, None].expand(1, 4)
    credit = FDivergenceAdvantage(case.divergence, variant).credit(drawn, drawn, mask, value)
    assert credit.count_nonzero() == 0


NEAR = [ForwardKL(), ReverseKL(), SkewForwardKL(0.1), SkewReverseKL(0.1), JensenShannon(0.5)]


@pytest.mark.parametrize("num_ids", [1000, 50_000, 152_000, 262_144])
def test_float32_keeps_the_gradient_of_nearly_equal_models(num_ids):
    student = random_logits(num_ids, rows=1)
    noise = torch.randn(1, num_ids, generator=torch.Generator().manual_seed(6))
    teacher = student + 1e-3 * noise
    for divergence in (*NEAR, Tempered(ForwardKL(), 2.0), TopK(ReverseKL(), 64)):
        for learner in ("student", "teacher"):
            truth = gradient(divergence, learner, student.double(), teacher.double())[1]
            found = gradient(divergence, learner, student, teacher)[1].double()
            assert (found - truth).norm() < 1e-3 * truth.norm(), (divergence, learner)
