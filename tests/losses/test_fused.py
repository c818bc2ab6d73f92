"""The fused training loss against all logits at once, differentiated by autograd.

Frozen here: loss, sums, metrics and gradients are the eager ones for any tile and block, for
frozen heads, biases, adapters on the head, tied weights, soft-capping and scale, vocabulary padding
and gaps, temperature, several weighted terms over several sources, and both sides learning; the
backward pass scales what is known, without a copy where the scale is 1; a frozen weight gets no
gradient; no positions are a connected zero; autocast and bf16 are measured in float32; what a loss
scaler multiplies has not been rounded to zero before; nothing is computed twice.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor, nn

from okd_lightning.divergences import (
    AlphaDivergence,
    ForwardKL,
    JensenShannon,
    ReverseKL,
    SkewReverseKL,
    Tempered,
)
from okd_lightning.losses import (
    DrawnLogProb,
    Entropy,
    ExactDivergence,
    Measured,
    Quantity,
    Side,
    Term,
    Tile,
    WeightedTerm,
    fused_loss,
    measure,
    projection,
    weighted_loss,
)
from okd_lightning.losses.reduction import loss_output
from okd_lightning.models import LMHead, Vocabulary
from okd_lightning.records.batches import LossOutput


def Sum(
    quantities: tuple[Quantity, ...], sources: tuple[str, ...] = ("dataset", "student")
) -> Term:
    """A term: the sum of its quantities, each times its number, over its sources."""

    def loss(measured: Measured) -> LossOutput:
        values = sum((i + 1) * measured[q] for i, q in enumerate(quantities))
        return loss_output(values, measured.mask(sources), first=measured[quantities[0]])

    return Term("sum", sources, quantities, loss, lambda step: 1.0)


JSD = WeightedTerm(Sum((ExactDivergence(JensenShannon(0.5)),)), 0.3)
TERMS = {
    "forward KL": [WeightedTerm(Sum((ExactDivergence(ForwardKL()),)), 1.0)],
    "JSD": [JSD],
    "generic": [WeightedTerm(Sum((ExactDivergence(AlphaDivergence(0.3)),)), 2.0)],
    "tempered": [WeightedTerm(Sum((ExactDivergence(Tempered(SkewReverseKL(), 2.0)),)), 1.0)],
    "cross-entropy": [WeightedTerm(Sum((DrawnLogProb(),)), -0.5)],
    "OKD": [
        WeightedTerm(
            Sum(
                (
                    ExactDivergence(ForwardKL()),
                    ExactDivergence(ReverseKL(), "teacher"),
                    DrawnLogProb("teacher"),
                )
            ),
            0.7,
        )
    ],
    "several": [
        WeightedTerm(Sum((ExactDivergence(Tempered(ForwardKL(), 3.0)),), ("dataset",)), 0.2),
        WeightedTerm(Sum((DrawnLogProb(), Entropy()), ("student",)), -0.4),
        WeightedTerm(Sum((ExactDivergence(ForwardKL()), Entropy("teacher")), ("teacher",)), 5.0),
        JSD,
    ],
}


def about(num: int) -> Measured:
    positions = torch.arange(num)
    return Measured({}, positions % 2, positions // 3, torch.zeros(num))


def eager(terms, pair, student: Side, teacher: Side | None):
    """Return the loss from all logits at once, by autograd."""
    quantities = [q for weighted in terms for q in weighted.term.quantities]
    logits = [None if s is None else s.finish(s.module(s.hidden)) for s in (student, teacher)]
    tile = Tile(*logits, pair.targets)
    values = {quantity: quantity.measure(tile) for quantity in quantities}
    return weighted_loss(terms, replace(about(len(pair.targets)), values=values))


def fused(terms, pair, student: Side, teacher: Side | None, tile=None, vocab_size=11):
    positions = about(len(pair.targets))
    return fused_loss(terms, student, teacher, pair.targets, positions, vocab_size, tile)


def gradients(pair, total: Tensor) -> list[Tensor]:
    """Return gradients of both sides' trained states and heads; zeros where none flows."""
    heads = [*pair.student_head.parameters(), *pair.teacher_head.parameters()]
    leaves = [pair.student_hidden, pair.teacher_hidden, *heads]
    leaves = [leaf for leaf in leaves if leaf.requires_grad]
    return list(torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True))


def check_same(found: list[Tensor], truth: list[Tensor]) -> None:
    for one, other in zip(found, truth, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11)


def check_outputs(found, truth) -> None:
    torch.testing.assert_close(found.total, truth.total)
    assert not any(output.sum.requires_grad for output in found.outputs)
    for one, other in zip(found.outputs, truth.outputs, strict=True):
        torch.testing.assert_close(one.sum, other.sum)
        assert int(one.count) == int(other.count)
        assert one.metrics.keys() == other.metrics.keys()
        for name in one.metrics:
            torch.testing.assert_close(one.metrics[name], other.metrics[name])


@pytest.mark.parametrize(("tile", "block"), [(1, 1), (3, 2), (4, 4), (7, 3), (None, 100)])
@pytest.mark.parametrize("name", TERMS)
def test_fused_is_eager_over_tiles_and_blocks(name, tile, block, make_pair, monkeypatch):
    monkeypatch.setattr(projection, "_BLOCK_ELEMENTS", {"cpu": 11 * block})
    whole, cut = make_pair(), make_pair()
    truth = eager(TERMS[name], whole, whole.student, whole.teacher)
    found = fused(TERMS[name], cut, cut.student, cut.teacher, tile)
    check_outputs(found, truth)
    check_same(gradients(cut, found.total), gradients(whole, truth.total))


@pytest.mark.parametrize("name", TERMS)
def test_the_checkpointed_path_is_eager_too(name, make_pair):
    whole, cut = make_pair(), make_pair()
    truth = eager(TERMS[name], whole, whole.student, whole.teacher)
    quantities = [q for weighted in TERMS[name] for q in weighted.term.quantities]
    values = measure(quantities, cut.student, cut.teacher, cut.targets, 11, 3)
    found = weighted_loss(TERMS[name], replace(about(7), values=values))
    check_outputs(found, truth)
    check_same(gradients(cut, found.total), gradients(whole, truth.total))


@pytest.mark.parametrize("frozen", ["head", "bias", "no bias", "body"])
def test_what_is_frozen_gets_no_gradient(frozen, make_pair):
    found = []
    for _ in range(2):
        pair = make_pair()
        if frozen == "head":
            pair.student_head.requires_grad_(False)
        if frozen == "bias":
            pair.student_head.bias.requires_grad_(False)
        if frozen == "no bias":
            pair.student_head.bias = None
        if frozen == "body":
            pair.student_hidden.requires_grad_(False)
        pair.teacher_head.requires_grad_(False)
        pair.teacher_hidden.requires_grad_(False)
        found.append(pair)
    truth = eager([JSD], found[0], found[0].student, found[0].teacher)
    loss = fused([JSD], found[1], found[1].student, found[1].teacher, 2)
    check_same(gradients(found[1], loss.total), gradients(found[0], truth.total))


class Adapted(nn.Module):
    """A head with something trained around a frozen weight."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, 2, bias=False, dtype=torch.float64)
        self.up = nn.Linear(2, base.out_features, bias=False, dtype=torch.float64)
        for i, linear in enumerate((self.down, self.up)):
            generator = torch.Generator().manual_seed(i)
            shape = linear.weight.shape
            linear.weight.data = torch.randn(shape, generator=generator, dtype=torch.float64)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.base(hidden) + self.up(self.down(hidden))


@pytest.mark.parametrize("name", ["JSD", "OKD"])
def test_an_adapter_on_either_head(name, make_pair):
    found = []
    for _ in range(2):
        pair = make_pair()
        pair.student_head = Adapted(pair.student_head)
        pair.teacher_head = Adapted(pair.teacher_head)
        found.append(pair)
    truth = eager(TERMS[name], found[0], found[0].student, found[0].teacher)
    loss = fused(TERMS[name], found[1], found[1].student, found[1].teacher, 3)
    check_same(gradients(found[1], loss.total), gradients(found[0], truth.total))


def test_a_hook_on_a_head_is_called(make_pair):
    pair, seen = make_pair(), []
    pair.student_head.register_forward_hook(lambda head, args, out: seen.append(len(out)))
    fused([JSD], pair, pair.student, pair.teacher, 4)
    assert seen == [4, 3]


def test_tied_weights_gather_both_gradients(make_pair):
    found = []
    for compute in (eager, fused):
        pair = make_pair()
        embedded = pair.student_head.weight[pair.targets].tanh()
        student = Side(embedded, pair.student_head)
        loss = compute([JSD], pair, student, pair.teacher)
        found.append(torch.autograd.grad(loss.total, [pair.student_head.weight]))
    check_same(list(found[1]), list(found[0]))


@pytest.mark.parametrize("invalid", [(), (2, 5)], ids=["padding", "gaps"])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.3, 2.0)])
@pytest.mark.parametrize("name", ["forward KL", "JSD", "OKD", "tempered"])
def test_padded_vocabularies_scales_and_softcaps(name, scale, softcap, invalid, make_pair):
    vocabulary, found = Vocabulary(8, invalid), []
    for compute in (eager, fused):
        pair = make_pair()
        pair.targets = torch.tensor([0, 1, 3, 4, 6, 7, 0])
        student = Side(pair.student_hidden, LMHead(pair.student_head, vocabulary, scale, softcap))
        teacher = Side(pair.teacher_hidden, LMHead(pair.teacher_head, vocabulary))
        settings = {"tile": 3, "vocab_size": 8} if compute is fused else {}
        loss = compute(TERMS[name], pair, student, teacher, **settings)
        found.append((pair, loss))
    (whole, truth), (cut, loss) = found
    check_outputs(loss, truth)
    check_same(gradients(cut, loss.total), gradients(whole, truth.total))
    grown = gradients(cut, fused(TERMS[name], cut, cut.student, cut.teacher).total)
    assert grown[0].isfinite().all()


def test_no_position_of_a_terms_sources(make_pair):
    pair = make_pair()
    loss = fused(
        [replace(JSD, term=Sum(JSD.term.quantities, ("teacher",)))],
        pair,
        pair.student,
        pair.teacher,
        3,
    )
    assert loss.total.item() == 0
    assert int(loss.outputs[0].count) == 0
    assert all(g.count_nonzero() == 0 for g in gradients(pair, loss.total))


def test_no_positions_are_a_connected_zero(make_pair):
    pair = make_pair(num_positions=0)
    loss = fused(TERMS["OKD"], pair, pair.student, pair.teacher)
    assert loss.total.item() == 0
    assert loss.outputs[0].metrics.keys() == {"first"}
    found = gradients(pair, loss.total)
    assert all(g.count_nonzero() == 0 for g in found)


def test_without_a_teacher_and_without_gradient(make_pair):
    pair = make_pair()
    terms = TERMS["cross-entropy"]
    truth = eager(terms, pair, pair.student, None)
    check_outputs(fused(terms, pair, pair.student, None, 2), truth)
    with torch.no_grad():
        found = fused(terms, pair, pair.student, None, 2)
    assert not found.total.requires_grad
    torch.testing.assert_close(found.total, truth.total.detach())


def test_the_backward_pass_scales_and_accumulates(make_pair):
    pair = make_pair()
    once = gradients(pair, fused([JSD], pair, pair.student, pair.teacher, 2).total)
    total = fused([JSD], pair, pair.student, pair.teacher, 2).total
    (4 * total).backward(retain_graph=True)
    (-1 * total).backward()
    leaves = [pair.student_hidden, pair.student_head.weight]
    for leaf, gradient in zip(leaves, (once[0], once[2]), strict=True):
        torch.testing.assert_close(leaf.grad, 3 * gradient)


def test_a_scale_of_one_copies_no_gradient(make_pair):
    pair = make_pair()
    total = fused([JSD], pair, pair.student, pair.teacher, 2).total
    known = total.grad_fn.saved_tensors
    inputs = [node.variable for node, _ in total.grad_fn.next_functions if node is not None]
    found = torch.autograd.grad(total, inputs, retain_graph=True)
    assert [g.data_ptr() for g in found] == [g.data_ptr() for g in known]
    twice = torch.autograd.grad(2 * total, inputs, retain_graph=True)
    again = torch.autograd.grad(total, inputs)
    for one, two, last in zip(found, twice, again, strict=True):
        assert torch.equal(two, 2 * one)
        assert torch.equal(last, one)


@pytest.mark.parametrize("name", ["JSD", "OKD", "cross-entropy"])
def test_gradcheck(name, make_pair):
    pair = make_pair(num_positions=3)
    heads = (pair.student_head, pair.teacher_head)

    def loss(student_hidden, teacher_hidden, *weights):
        sides = []
        for hidden, head in zip((student_hidden, teacher_hidden), heads, strict=True):
            sides.append(Side(hidden, head))
        return fused(terms, pair, *sides, 2).total

    terms = TERMS[name]
    if (
        name == "OKD"
    ):  # each side's loss holds the other constant: no one function has this gradient
        terms = [WeightedTerm(Sum((ExactDivergence(ReverseKL(), "teacher"),)), 1.0)]
        pair.student_hidden.requires_grad_(False)
        pair.student_head.requires_grad_(False)
    else:
        pair.teacher_hidden.requires_grad_(False)
        pair.teacher_head.requires_grad_(False)
    inputs = (pair.student_hidden, pair.teacher_hidden, *(h.weight for h in heads))
    assert torch.autograd.gradcheck(loss, inputs)


def test_bf16_hidden_states_and_heads(make_pair):
    wide, narrow = make_pair(), make_pair(dtype=torch.bfloat16)
    vocabulary = Vocabulary(11)
    truth = eager(TERMS["OKD"], wide, wide.student, wide.teacher)
    sides = [
        Side(narrow.student_hidden, LMHead(narrow.student_head, vocabulary)),
        Side(narrow.teacher_hidden, LMHead(narrow.teacher_head, vocabulary)),
    ]
    found = fused(TERMS["OKD"], narrow, *sides, 2)
    assert found.total.dtype == torch.float32
    torch.testing.assert_close(found.total.double(), truth.total, rtol=0.03, atol=0.03)
    of_narrow, of_wide = gradients(narrow, found.total), gradients(wide, truth.total)
    for one, other in zip(of_narrow, of_wide, strict=True):
        assert one.dtype == torch.bfloat16
        torch.testing.assert_close(one.double(), other, rtol=0.1, atol=0.1)


def test_autocast_multiplies_in_bf16_and_measures_in_float32(make_pair):
    found = []
    for compute in (eager, fused):
        pair = make_pair(dtype=torch.float32)
        vocabulary = Vocabulary(11)
        sides = [
            Side(pair.student_hidden, LMHead(pair.student_head, vocabulary)),
            Side(pair.teacher_hidden, LMHead(pair.teacher_head, vocabulary)),
        ]
        with torch.autocast("cpu", torch.bfloat16):
            loss = compute(TERMS["OKD"], pair, *sides)
        assert loss.total.dtype == torch.float32
        found.append((loss.total, gradients(pair, loss.total)))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-4, atol=1e-5)
    for one, other in zip(found[1][1], found[0][1], strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("num_tokens", [1000, 100_000])
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_a_loss_scaler_finds_what_float16_would_round_away(half, num_tokens, make_pair):
    """The scale is applied, as with a GradScaler, after the factor, one over the step's tokens."""
    scale = 65536.0 if half == torch.float16 else 1.0
    found = []
    for is_narrow in (False, True):
        pair = make_pair(dtype=torch.float32)
        terms = [replace(TERMS["OKD"][0], factor=1 / num_tokens)]
        dtype = half if is_narrow else torch.float32
        student = Side(pair.student_hidden.to(dtype), pair.student_head)
        teacher = Side(pair.teacher_hidden.to(dtype), pair.teacher_head)
        with torch.autocast("cpu", half, enabled=is_narrow):
            total = fused(terms, pair, student, teacher).total
        found.append([g / scale for g in gradients(pair, total * scale)])
    for one, other in zip(found[1], found[0], strict=True):
        tolerance = 0.01 if half == torch.float16 else 0.05
        assert float((one - other).norm() / other.norm()) < tolerance


@dataclass(frozen=True)
class Counted(Quantity):
    calls: list = field(hash=False)
    needs_teacher = False

    def measure(self, tile: Tile) -> Tensor:
        self.calls.append(len(tile.targets))
        return tile.student_logprobs[:, 0]


def test_nothing_is_computed_twice(make_pair):
    pair, counted = make_pair(), Counted([])
    terms = [WeightedTerm(Sum((counted,)), 1.0), WeightedTerm(Sum((counted,)), 2.0)]
    fused(terms, pair, pair.student, None, 3).total.backward()
    assert counted.calls == [3, 3, 1]
