"""Run a plug-in and compare every step with a formula written out row by row in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import reference_loss as reference
import tiny
import torch
from torch import Tensor

DATASET, STUDENT, TEACHER = 0, 1, 2

Values = Callable[..., Tensor]
"""(log p, log q: [tokens, vocab]; drawn; the sampler's log-probs; source) → a loss a token.

Of a method with a third model, that one's log-probs come last.
"""


def step_losses(student, teacher, batches, values: Values, others=()) -> dict[int, Tensor]:
    """The mean of ``values`` over the loss tokens of each source in some batches, row by row."""
    found_of: dict[int, list[Tensor]] = {}
    for batch in batches:
        for i, length in enumerate(batch.lengths.tolist()):
            ids, keep = batch.input_ids[i, :length].tolist(), batch.mask[i, 1:length]
            if not keep.any():
                continue
            read, at = ids, keep
            if batch.teacher_input_ids is not None:
                length = int(batch.teacher_lengths[i])
                read = batch.teacher_input_ids[i, :length].tolist()
                at = batch.teacher_mask[i, 1:length]
            log_p = reference.row_logprobs(student, ids, tiny.NUM_IDS)[keep]
            with torch.no_grad():
                constant = [
                    reference.row_logprobs(model, read, tiny.NUM_IDS)[at]
                    for model in (teacher, *others)
                ]
            drawn = torch.tensor(ids[1:])[keep]
            sampler = batch.sampler_logprobs[i, 1 : len(ids)][keep].double()
            found = values(log_p, constant[0], drawn, sampler, int(batch.source[i]), *constant[1:])
            found_of.setdefault(int(batch.source[i]), []).append(found)
    return {source: torch.cat(parts).mean() for source, parts in found_of.items()}


def check(tmp_path, module, method, values: Values, others=(), **settings):
    """Fit with it, and compare every step's loss and gradient; returns what was recorded.

    The loss is the sum of the means over each source's rows. ``others``: further frozen models.
    """
    snapshots = reference.Snapshots()
    recorder = tiny.fit(
        tmp_path,
        module,
        [method],
        tiny.make_rows(21),
        callbacks=[snapshots],
        accumulate_grad_batches=2,
        **settings,
    )
    teacher = reference.double(module.teacher or module.student)
    for i, losses in enumerate(recorder.losses):
        means = step_losses(snapshots.students[i], teacher, recorder.steps[i], values, others)
        loss = method.weight * sum(means.values())
        assert losses["train/loss"] == pytest.approx(loss.item(), rel=1e-4, abs=1e-5)
        shared = [recorder.token_share(i, source) * mean for source, mean in means.items()]
        expected = reference.gradients(snapshots.students[i], method.weight * sum(shared))
        found = {n.removeprefix("student."): g for n, g in recorder.gradients[i].items()}
        assert tiny.distance(found, expected) < 2e-4
    assert len(recorder.losses) > 1
    return recorder


def at(logprobs: Tensor, drawn: Tensor) -> Tensor:
    return logprobs.gather(-1, drawn[:, None])[:, 0]
