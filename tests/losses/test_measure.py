"""Tiles: how heads are run over positions in bounded memory.

Frozen here: values and gradients do not depend on the tile; where several tiles are needed, each is
recomputed in the backward pass, whatever the gradient says; no positions give an empty result whose
sum is connected to all of the student; half-precision hidden states are measured in float32; a
quantity is computed once however often it is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from okd_lightning.divergences import ForwardKL, JensenShannon, Tempered
from okd_lightning.losses import (
    Agreement,
    DrawnLogProb,
    Entropy,
    ExactDivergence,
    Quantity,
    Side,
    Tile,
    measure,
)
from okd_lightning.models import LMHead, Vocabulary

QUANTITIES = (
    ExactDivergence(ForwardKL()),
    ExactDivergence(JensenShannon(0.5), "teacher"),
    ExactDivergence(Tempered(ForwardKL(), 2.0)),
    DrawnLogProb(),
    Entropy("teacher"),
    Agreement(),
)


def total(values) -> torch.Tensor:
    return sum((1 + i) * value.square().sum() for i, value in enumerate(values.values()))


@pytest.mark.parametrize("tile_positions", [1, 3, 7, 1000, None])
def test_tiles_change_neither_values_nor_gradients(tile_positions, make_pair):
    whole, cut = make_pair(), make_pair()
    expected = measure(QUANTITIES, whole.student, whole.teacher, whole.targets, 11, 1000)
    found = measure(QUANTITIES, cut.student, cut.teacher, cut.targets, 11, tile_positions)
    for quantity in QUANTITIES:
        torch.testing.assert_close(found[quantity], expected[quantity], rtol=1e-12, atol=1e-12)
    truth = whole.gradients(total(expected))
    gradients = cut.gradients(total(found))
    for name in truth:
        torch.testing.assert_close(gradients[name], truth[name], rtol=1e-10, atol=1e-12)


@dataclass(frozen=True)
class Counted(Quantity):
    """Quantity that counts its computations."""

    calls: list
    needs_teacher = False

    def __hash__(self) -> int:
        return id(self.calls)

    def measure(self, tile: Tile) -> torch.Tensor:
        self.calls.append(len(tile.targets))
        return tile.student_logprobs[:, 0]


def test_several_tiles_are_recomputed_in_the_backward_pass_and_one_is_not(make_pair):
    pair, one, several = make_pair(), Counted([]), Counted([])
    measure([one], pair.student, None, pair.targets, 11, 7)[one].sum().backward()
    assert one.calls == [7]
    values = measure([several], pair.student, None, pair.targets, 11, 3)[several]
    assert several.calls == [3, 3, 1]
    values.sum().backward()
    assert sorted(several.calls) == [1, 1, 3, 3, 3, 3]


def test_nothing_is_recomputed_or_kept_without_gradient(make_pair):
    pair, counted = make_pair(), Counted([])
    with torch.no_grad():
        values = measure([counted], pair.student, None, pair.targets, 11, 3)[counted]
    assert counted.calls == [3, 3, 1]
    assert not values.requires_grad


def test_what_is_asked_for_twice_is_computed_once(make_pair):
    pair, counted = make_pair(), Counted([])
    measure([counted, counted], pair.student, None, pair.targets, 11)
    assert counted.calls == [7]


def test_no_positions_are_a_zero_that_is_connected_to_the_student(make_pair):
    pair = make_pair(num_positions=0)
    values = measure(QUANTITIES, pair.student, pair.teacher, pair.targets, 11)
    assert all(value.shape == (0,) for value in values.values())
    gradients = pair.gradients(values[QUANTITIES[0]].sum())
    assert gradients["student_head"].count_nonzero() == 0
    assert gradients["student_hidden"].shape == pair.student_hidden.shape


def test_many_tiles_of_bf16_hidden_states_are_measured_in_float32(make_pair):
    wide, narrow = make_pair(), make_pair(dtype=torch.bfloat16)
    vocabulary = Vocabulary(11)
    sides = [
        Side(hidden, LMHead(head, vocabulary))
        for hidden, head in (
            (narrow.student_hidden, narrow.student_head),
            (narrow.teacher_hidden, narrow.teacher_head),
        )
    ]
    expected = measure(QUANTITIES, wide.student, wide.teacher, wide.targets, 11)
    found = measure(QUANTITIES, *sides, narrow.targets, 11, 2)
    for quantity in QUANTITIES:
        assert found[quantity].dtype == torch.float32
        torch.testing.assert_close(
            found[quantity].double(), expected[quantity], rtol=0.05, atol=0.05
        )
    found[QUANTITIES[0]].sum().backward()
    assert narrow.student_hidden.grad.dtype == torch.bfloat16
    assert narrow.student_hidden.grad.count_nonzero() > 0


def test_the_default_tile_and_block_bound_the_logits_that_are_alive(make_pair):
    pair, counted, tiled = make_pair(), Counted([]), []
    pair.student_head.register_forward_hook(lambda head, args, out: tiled.append(len(out)))
    measure([counted], pair.student, None, pair.targets, vocab_size=2**21)
    assert tiled == [4, 3]
    assert counted.calls == [1] * 7
