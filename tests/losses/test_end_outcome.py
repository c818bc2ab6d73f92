"""Several end ids as one outcome of both models.

Frozen here: the toy of two models that stop equally often with different ids keeps its stop under
reverse KL, OPD and forward KL if the ids are one outcome, and loses it under the first two if not;
the merged loss and its gradient are those of autograd on the distribution with one column for all
ends, for both learners, soft-capping, scale, temperature, top-k, adapters on the head and any
tiling; the order is scale, soft-cap, mask, merge, temper; cross-entropy on dataset targets is that
of the raw id, and a sampled end's log-probability that of all ends where the sampler's is; one end
id changes no bit.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_fused import TERMS, Adapted, Sum, about, check_outputs, check_same, gradients
from torch import Tensor

from okd_lightning.divergences import ForwardKL, JensenShannon, ReverseKL, Tempered, TopK
from okd_lightning.losses import (
    Agreement,
    DrawnLogProb,
    DrawnOutcome,
    Entropy,
    ExactDivergence,
    ExpectedWeight,
    Side,
    TeacherShift,
    Tile,
    WeightedTerm,
    fused_loss,
    measure,
)
from okd_lightning.models import LMHead, Vocabulary

ENDS = (4, 1, 9)
NUM_IDS = 11


# ---------------------------------------------------------------- the toy

STUDENTS_END, TEACHERS_END, TOY_IDS = 1, 2, 8


def toy_logits(end: int) -> Tensor:
    """Logits of one position: probability 0.312 on the end, the rest evenly on six tokens."""
    probs = torch.full((TOY_IDS,), 1e-6, dtype=torch.float64)
    probs[[0, *range(3, TOY_IDS)]] = (1 - 0.312) / 6
    probs[end] = 0.312
    return probs.log()


def stopped_after(loss: str, end_ids: tuple[int, ...], steps: int = 100) -> float:
    """Return the probability of either end after some steps of Adam."""
    teacher = toy_logits(TEACHERS_END)[None]
    student = toy_logits(STUDENTS_END)[None].clone().requires_grad_()
    optimizer = torch.optim.Adam([student], lr=0.05)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        optimizer.zero_grad()
        if loss == "OPD":
            probs = student.detach().softmax(-1)[0]
            drawn = torch.multinomial(probs, 512, replacement=True, generator=generator)
            tile = Tile(
                student.expand(512, -1),
                teacher.expand(512, -1),
                drawn,
                end_ids=end_ids,
                merges_ends=torch.ones(512, dtype=torch.bool),
            )
            credit = DrawnOutcome("teacher", ReverseKL()).measure(tile)
            credit = credit - DrawnOutcome("student", ReverseKL()).measure(tile)
            total = -(credit * DrawnLogProb().measure(tile)).mean()
        else:
            divergence = {"reverse KL": ReverseKL(), "forward KL": ForwardKL()}[loss]
            tile = Tile(student, teacher, torch.zeros(1, dtype=torch.long), end_ids=end_ids)
            total = ExactDivergence(divergence).measure(tile).sum()
        total.backward()
        optimizer.step()
    probs = student.detach().softmax(-1)[0]
    return float(probs[STUDENTS_END] + probs[TEACHERS_END])


@pytest.mark.parametrize("loss", ["reverse KL", "OPD", "forward KL"])
def test_stop_stays_where_the_ends_are_one_outcome(loss):
    found = stopped_after(loss, (STUDENTS_END, TEACHERS_END))
    assert found == pytest.approx(0.312, abs=0.01 if loss == "OPD" else 1e-4)


@pytest.mark.parametrize("loss", ["reverse KL", "OPD"])
def test_stop_goes_where_only_one_id_is_an_end(loss):
    assert stopped_after(loss, (STUDENTS_END,)) < 0.05


# ---------------------------------------------------------------- the reference


def one_column(logits: Tensor, ends=ENDS) -> Tensor:
    """Logits with all ends in the last column: the merge as written on paper."""
    others = [i for i in range(logits.shape[-1]) if i not in ends]
    return torch.cat([logits[:, others], logits[:, list(ends)].logsumexp(-1, keepdim=True)], -1)


def finished(side: Side, scale=1.0, softcap=None) -> Tensor:
    logits = side.module(side.hidden) * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def merged_targets(targets: Tensor) -> Tensor:
    """The column of ``one_column`` that each target is in."""
    others = [i for i in range(NUM_IDS) if i not in ENDS]
    return torch.tensor([others.index(t) if t not in ENDS else len(others) for t in targets])


def eager(terms, pair, scale=1.0, softcap=None):
    """Return the loss from all logits, in columns of outcomes, by autograd."""
    raw = [finished(side, scale, softcap) for side in (pair.student, pair.teacher)]
    tile = Tile(*map(one_column, raw), merged_targets(pair.targets))
    ids = pair.targets[:, None]
    values = {}
    for quantity in {q for weighted in terms for q in weighted.term.quantities}:
        if isinstance(quantity, DrawnLogProb):
            logits = raw[0] if quantity.role == "student" else raw[1]
            values[quantity] = logits.log_softmax(-1).gather(-1, ids)[:, 0]
        else:
            values[quantity] = quantity.measure(tile)
    measured = replace(about(len(pair.targets)), values=values)
    outputs = [weighted.term.loss(measured) for weighted in terms]
    return sum(w.factor * o.sum for w, o in zip(terms, outputs, strict=True))


def with_ends(side: Side, scale=1.0, softcap=None) -> Side:
    head = LMHead(side.module, Vocabulary(NUM_IDS, (), ENDS), scale, softcap)
    return Side(side.hidden, head, ENDS)


def some_ends(pair):
    """The pair with ends among its targets."""
    pair.targets = pair.targets.clone()
    pair.targets[: len(ENDS)] = torch.tensor(ENDS)
    return pair


MORE = {
    **{name: TERMS[name] for name in ("JSD", "tempered", "cross-entropy", "OKD", "several")},
    "top-k": [WeightedTerm(Sum((ExactDivergence(TopK(ReverseKL(), 3)),)), 1.0)],
    "tempered top-k": [
        WeightedTerm(Sum((ExactDivergence(Tempered(TopK(ForwardKL(), 2), 2.0)),)), 1.0)
    ],
}


@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.3, 2.0)])
@pytest.mark.parametrize("name", MORE)
def test_loss_and_gradient_are_those_of_the_merged_distribution(name, scale, softcap, make_pair):
    whole, cut = some_ends(make_pair()), some_ends(make_pair())
    truth = eager(MORE[name], whole, scale, softcap)
    sides = [with_ends(side, scale, softcap) for side in (cut.student, cut.teacher)]
    positions = about(len(cut.targets))
    found = fused_loss(MORE[name], *sides, cut.targets, positions, NUM_IDS, 3)
    torch.testing.assert_close(found.total, truth)
    check_same(gradients(cut, found.total), gradients(whole, truth))


@pytest.mark.parametrize("name", ["tempered", "OKD"])
def test_the_checkpointed_path_is_the_same(name, make_pair):
    whole, cut = some_ends(make_pair()), some_ends(make_pair())
    truth = eager(MORE[name], whole)
    quantities = [q for weighted in MORE[name] for q in weighted.term.quantities]
    sides = [with_ends(side) for side in (cut.student, cut.teacher)]
    values = measure(quantities, *sides, cut.targets, NUM_IDS, 3)
    measured = replace(about(len(cut.targets)), values=values)
    found = sum(w.factor * w.term.loss(measured).sum for w in MORE[name])
    check_same(gradients(cut, found), gradients(whole, truth))


def test_an_adapter_on_either_head_and_tied_weights(make_pair):
    found = []
    for is_fused in (False, True):
        pair = some_ends(make_pair())
        pair.student_head, pair.teacher_head = (
            Adapted(pair.student_head),
            Adapted(pair.teacher_head),
        )
        total = eager(MORE["OKD"], pair)
        if is_fused:
            sides = [with_ends(side) for side in (pair.student, pair.teacher)]
            positions = about(len(pair.targets))
            total = fused_loss(MORE["OKD"], *sides, pair.targets, positions, NUM_IDS, 3).total
        found.append(gradients(pair, total))
    check_same(found[1], found[0])
    tied = []
    for is_fused in (False, True):
        pair = some_ends(make_pair())
        embedded = pair.student_head.weight[pair.targets].tanh()
        pair.student_hidden = embedded
        total = eager(MORE["JSD"], pair)
        if is_fused:
            sides = [with_ends(side) for side in (pair.student, pair.teacher)]
            positions = about(len(pair.targets))
            total = fused_loss(MORE["JSD"], *sides, pair.targets, positions, NUM_IDS, 3).total
        tied.append(torch.autograd.grad(total, [pair.student_head.weight]))
    check_same(list(tied[1]), list(tied[0]))


def test_gradcheck_of_a_tempered_divergence(make_pair):
    logits = torch.randn(3, NUM_IDS, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(3, NUM_IDS, dtype=torch.float64)

    def value(student: Tensor) -> Tensor:
        tile = Tile(student, teacher, torch.tensor([1, 4, 0]), end_ids=ENDS)
        exact = ExactDivergence(Tempered(JensenShannon(0.3), 1.7)).measure(tile)
        return exact + DrawnLogProb().measure(tile) + Entropy().measure(tile)

    assert torch.autograd.gradcheck(value, (logits,))


def test_merge_precedes_the_temperature():
    logits = torch.tensor([[0.0, 0.0, 0.5]], dtype=torch.float64)
    tile = Tile(logits, logits, torch.tensor([0]), end_ids=(0, 1))
    merged = torch.tensor([2.0, 0.5], dtype=torch.float64)
    merged[0] = merged[0].log()
    expected = (merged / 2).softmax(-1)[0]
    assert float(tile.pair(2.0).student_probs[0, 0]) == pytest.approx(float(expected))


# ---------------------------------------------------------------- quantities


def a_tile(merges_ends: Tensor | None = None, end_ids=ENDS) -> tuple[Tile, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    student, teacher, base = torch.randn(3, 4, NUM_IDS, generator=generator, dtype=torch.float64)
    targets = torch.tensor([1, 9, 0, 4])
    tile = Tile(student, teacher, targets, base, end_ids, merges_ends)
    return tile, student.log_softmax(-1), targets


def test_targets_of_a_dataset_keep_their_ids_and_samples_are_outcomes():
    is_sample = torch.tensor([True, False, True, False])
    tile, logprobs, targets = a_tile(is_sample)
    raw = logprobs.gather(-1, targets[:, None])[:, 0]
    ends = logprobs[:, list(ENDS)].logsumexp(-1)
    expected = torch.where(is_sample & (targets != 0), ends, raw)
    torch.testing.assert_close(DrawnLogProb().measure(tile), expected)
    outcome = torch.where(targets != 0, ends, raw)
    torch.testing.assert_close(DrawnOutcome("student", ReverseKL()).measure(tile), outcome)
    tile, _, _ = a_tile()
    torch.testing.assert_close(DrawnLogProb().measure(tile), raw)
    assert tile.targets.tolist() == [4, 4, 0, 4]


def test_entropy_agreement_baseline_and_shift_see_one_stop():
    tile = a_tile()[0]
    sides = [one_column(tile._raw[name]) for name in ("student", "teacher", "base")]
    plain = Tile(*sides[:2], torch.zeros(4, dtype=torch.long), sides[2])
    for quantity in (Entropy(), Agreement(), ExpectedWeight(ForwardKL()), TeacherShift()):
        torch.testing.assert_close(quantity.measure(tile), quantity.measure(plain))


@pytest.mark.parametrize("name", TERMS)
def test_one_end_id_changes_no_bit(name, make_pair):
    found = []
    for ends in ((), (4,)):
        pair = some_ends(make_pair())
        sides = [replace(side, end_ids=ends) for side in (pair.student, pair.teacher)]
        positions = about(len(pair.targets))
        loss = fused_loss(TERMS[name], *sides, pair.targets, positions, NUM_IDS, 3)
        found.append((loss, gradients(pair, loss.total)))
    (loss, grads), (same, same_grads) = found
    check_outputs(loss, same)
    assert torch.equal(loss.total, same.total)
    assert all(torch.equal(a, b) for a, b in zip(grads, same_grads, strict=True))


def test_float32_ends_without_probability_are_no_nan():
    logits = torch.full((2, 5), -torch.inf)
    logits[:, 0] = 0.0
    student = logits.clone().requires_grad_()
    tile = Tile(student, logits, torch.tensor([0, 0]), end_ids=(3, 4))
    value = ExactDivergence(ForwardKL()).measure(tile)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    assert value.tolist() == [0.0, 0.0]
    assert not gradient.isnan().any()
