"""Checkpoints of a user's own ``ModelCheckpoint``.

Frozen here: a run that is resumed from any of them validates as often as the run without a stop, at
the same steps, and ends with the same weights, also where the checkpoint was written just before a
validation.
"""

from __future__ import annotations

import pytest
import tiny
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from okd_lightning.callbacks import GKD
from okd_lightning.training.module import DistillationModule

STEPS, EVERY = 8, 2


class Validations(Callback):
    """(step, forward KL) of every validation."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, float]] = []

    def on_validation_end(self, trainer, pl_module):
        self.seen.append((trainer.global_step, float(trainer.callback_metrics["val/forward_kl"])))


def run(root, accumulate, ckpt_path=None):
    torch.manual_seed(1)
    teacher = tiny.make_llama(2, tiny.TEACHER_ROWS)
    tokenizer = tiny.make_tokenizer()
    module = DistillationModule(tiny.make_llama(1), teacher, tokenizer=tokenizer)
    validations = Validations()
    keep = ModelCheckpoint(root, "{step}", every_n_train_steps=1, save_top_k=-1)
    tiny.fit(
        root,
        module,
        [GKD(0.5, on_policy_fraction=0.5)],
        tiny.make_rows(12),
        val=tiny.make_rows(4, seed=2),
        callbacks=[keep, validations],
        data={"batch_size": 4 // accumulate},
        ckpt_path=ckpt_path,
        max_epochs=-1,
        max_steps=STEPS,
        val_check_interval=EVERY,
        check_val_every_n_epoch=None,
        accumulate_grad_batches=accumulate,
        num_sanity_val_steps=0,
    )
    return validations.seen, tiny.weights(module)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_run_validates_at_the_same_steps(tmp_path, accumulate):
    seen, weights = run(tmp_path / "whole", accumulate)
    assert [step for step, _ in seen] == list(range(EVERY, STEPS + 1, EVERY))
    for step in (3, 4, 6):
        kept = tmp_path / "whole" / f"step={step}.ckpt"
        again, resumed = run(tmp_path / f"from {step}", accumulate, kept)
        assert again == [(at, value) for at, value in seen if at >= step]
        assert all(torch.equal(resumed[name], value) for name, value in weights.items())
