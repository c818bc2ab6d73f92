"""Cost of a quantised teacher: its divergence from the model that it was made of."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from okd_lightning.commands.diagnose.findings import Check, Estimate
from okd_lightning.commands.diagnose.positions import tokens_of
from okd_lightning.commands.diagnose.responses import Responses
from okd_lightning.losses import TeacherShift
from okd_lightning.training.module import DistillationModule

OPTION = "--full_teacher"
_SMALL = 0.1
"""Share of the student's forward KL up to which the quantisation's is small."""

_NAMES = {"given": "dataset responses", "student": "the student's", "teacher": "the teacher's"}


@torch.no_grad()
def quantisation_check(
    module: DistillationModule,
    kinds: Sequence[Responses],
    forward_kl: Estimate | None,
    batch_size: int,
) -> Check:
    """Return the divergence of the teacher from its base, KL(base‖teacher), by responses.

    Args:
        module: A module with a teacher's base (``add_teacher_base``).
        kinds: Responses of each kind.
        forward_kl: The student's, from the teacher on dataset responses; None where there are none.
        batch_size: Rows per batch.
    """
    found = {
        responses.author: tokens_of(
            module, responses.batches(batch_size, module.device), {"shift": TeacherShift()}
        ).estimate("shift")
        for responses in kinds
        if responses.num_tokens
    }
    shown = ", ".join(f"{found[kind].text(4)} on {_NAMES[kind]}" for kind in found)
    text = f"KL({OPTION}‖teacher) in nats per token: {shown}"
    first = next(iter(found.values()))
    if forward_kl is None or forward_kl.mean <= 0:
        return Check("quantised teacher", "good", text)
    share = first.mean / forward_kl.mean
    text += f"; that is {share:.1%} of the student's forward KL"
    if share <= _SMALL:
        return Check("quantised teacher", "good", text)
    advice = "the student would learn the quantisation too: take more bits, or the full teacher"
    return Check("quantised teacher", "look", f"{text}; {advice}")
