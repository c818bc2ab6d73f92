"""Runs that have ended and go on with more epochs or steps.

Frozen here: the weights and losses are those of a run that was longer from the start.
"""

from __future__ import annotations

import pytest
import tiny
import torch

from okd_lightning.callbacks import GKD, LastCheckpoint
from okd_lightning.data import RolloutDataModule
from okd_lightning.training.module import DistillationModule

SHORT = {"max_response_length": 8, "val_rollouts": 0}


@pytest.fixture(scope="module")
def folders(dropout_folder, teacher_folder):
    return dropout_folder, teacher_folder


@pytest.mark.parametrize("val_check_interval", [None, 4])
@pytest.mark.parametrize("max_steps", [-1, 99], ids=["by epochs", "by steps"])
def test_a_finished_run_continues_with_more_epochs(
    val_check_interval, max_steps, folders, tmp_path
):
    def run(root, max_epochs, ckpt_path=None):
        module = DistillationModule(*map(str, folders), learning_rate=3e-3)
        callbacks = [GKD(0.5), LastCheckpoint()]
        val = {"val_check_interval": val_check_interval} if val_check_interval else {}
        trainer = tiny.make_trainer(
            root, callbacks, max_epochs=max_epochs, max_steps=max_steps, **val
        )
        settings = {"max_response_length": 6, "val_rollouts": 2, "seed": 7, "batch_size": 4}
        data = RolloutDataModule(tiny.make_rows(19), tiny.make_rows(3), **settings)
        trainer.fit(module, data, ckpt_path=ckpt_path)
        return tiny.weights(module), trainer.global_step

    torch.manual_seed(0)
    whole, steps = run(tmp_path / "a", 3)
    torch.manual_seed(0)
    run(tmp_path / "b", 1)
    path = str(tmp_path / "b" / "checkpoints" / "last.ckpt")
    for max_epochs in (2, 3):
        resumed, resumed_steps = run(tmp_path / "b", max_epochs, path)
    assert (steps, resumed_steps) == (15, 15)
    assert tiny.distance(resumed, whole) == 0


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_that_ended_within_an_epoch_is_prolonged(tmp_path, make_module, accumulate):
    def fit(folder, **settings):
        recorder = tiny.fit(
            folder,
            make_module(),
            [GKD(0.5, on_policy_fraction=0.5), LastCheckpoint()],
            tiny.make_rows(24),
            data={"batch_size": 4, "seed": 7, **SHORT},
            accumulate_grad_batches=accumulate,
            **settings,
        )
        return recorder.losses

    whole = fit(tmp_path / "whole", max_epochs=2)
    end = len(whole) // 4
    short = fit(tmp_path / "short", max_epochs=-1, max_steps=end)
    last = tmp_path / "short" / "checkpoints" / "last.ckpt"
    prolonged = fit(tmp_path / "short", max_epochs=2, max_steps=-1, ckpt_path=str(last))
    assert short + prolonged == whole
