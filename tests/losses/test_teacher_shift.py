"""Shift of the teacher by its online module: D(adapted, base).

Frozen here: the value is the reference's, with forward KL KL(base‖adapted); gradient flows to the
adapted teacher alone, where it learns, and never to the base or the student; values and gradients
do not depend on the tile; only this quantity asks for the base.
"""

from __future__ import annotations

import pytest
import reference_loss as reference
import torch

from okd_lightning.divergences import ForwardKL, ReverseKL, Tempered
from okd_lightning.losses import ExactDivergence, Side, TeacherShift, measure

SHIFTS = {
    TeacherShift(): lambda q, q0: reference.kl(q0, q),
    TeacherShift(ForwardKL(), learns=True): lambda q, q0: reference.kl(q0, q),
    TeacherShift(ReverseKL(), learns=True): lambda q, q0: reference.kl(q, q0),
    TeacherShift(Tempered(ForwardKL(), 2.0), learns=True): lambda q, q0: (
        4 * reference.kl((q0 / 2).log_softmax(-1), (q / 2).log_softmax(-1))
    ),
}


@pytest.mark.parametrize("tile_positions", [1, 3, 1000])
@pytest.mark.parametrize("shift", SHIFTS, ids=repr)
def test_value_and_gradient(shift, tile_positions, pair, make_pair):
    base = make_pair()
    base.teacher_hidden.data += 0.3
    other = ExactDivergence(ForwardKL())  # besides the student's own loss
    values = measure(
        [other, shift],
        pair.student,
        pair.teacher,
        pair.targets,
        11,
        tile_positions,
        base=Side(base.teacher_hidden, base.teacher_head),
    )
    q, q0 = pair.logits()[1].log_softmax(-1), base.logits()[1].log_softmax(-1).detach()
    expected = SHIFTS[shift](q, q0)
    torch.testing.assert_close(values[shift], expected, rtol=1e-9, atol=1e-12)
    assert shift.trains_teacher == shift.learns
    found = pair.gradients((values[other] + 2 * values[shift]).sum())
    for name, truth in pair.gradients(expected.sum()).items():
        if truth is not None and shift.learns:
            torch.testing.assert_close(found[name], 2 * truth, rtol=1e-9, atol=1e-12)
        elif name.startswith("teacher"):
            assert found[name] is None
    without = measure([other], pair.student, pair.teacher, pair.targets, 11)[other]
    for name, truth in pair.gradients(without.sum()).items():
        if name.startswith("student"):
            torch.testing.assert_close(found[name], truth)
    assert all(gradient is None for gradient in base.gradients(values[other].sum()).values())
    if shift.learns:
        assert all(gradient is None for gradient in base.gradients(values[shift].sum()).values())
    else:
        assert not values[shift].requires_grad


def test_only_the_shift_needs_the_base():
    assert TeacherShift().needs_base_teacher
    assert not ExactDivergence(ForwardKL(), "teacher").needs_base_teacher
