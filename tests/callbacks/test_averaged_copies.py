"""Weight averaging in runs with a teacher.

Frozen here: an averaged copy shares the teacher's memory, and checkpoints do not hold the teacher.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from lightning.pytorch.callbacks import (
    Callback,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning_runs import (
    Case,
    close,
    make_data,
    make_module,
    run_with,
    weights,
)
from torch import Tensor

from okd_lightning import KD, DistillationModule

pytestmark = pytest.mark.filterwarnings("ignore")


class Copied(Callback):
    """Callback that copies the module in ``setup``, as averaging does, and keeps the checkpoint."""

    copied: DistillationModule

    def setup(self, trainer, pl_module, stage):
        self.listed = {id(p) for p in pl_module.parameters()}
        self.copied = copy.deepcopy(pl_module)

    def on_train_end(self, trainer, pl_module):
        pairs = zip(self.copied.parameters(), pl_module.parameters(), strict=True)
        assert all(own is not other for own, other in pairs)


def test_a_copy_in_a_run_shares_the_teacher_and_lists_what_is_trained(tmp_path, capfd):
    callback = Copied()
    case = Case(lambda f: callback, lambda r: True, {"max_epochs": 1})
    run = run_with(callback, tmp_path, capfd, case, KD())
    teachers = zip(
        callback.copied.teacher.parameters(), run.module.teacher.parameters(), strict=True
    )
    assert all(own is other for own, other in teachers)
    assert callback.listed == {id(p) for p in run.module.student.parameters()}
    everything = {n for n, _ in run.module.named_parameters()}  # again, after the run
    assert any(name.startswith("teacher.") for name in everything)
    callback.copied.to(torch.float64)  # moves its own weights alone
    assert next(run.module.teacher.parameters()).dtype == torch.float32
    assert next(callback.copied.student.parameters()).dtype == torch.float64


@pytest.mark.parametrize("kind", ["EMA", "SWA"])
def test_checkpoints_of_averages_hold_no_teacher_and_go_on(kind, tmp_path):
    def fit(ckpt_path: Path | None = None):
        module = make_module()
        averaging = EMAWeightAveraging(decay=0.5) if kind == "EMA" else swa()
        saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=4, save_top_k=-1)
        trainer = tiny.make_trainer(tmp_path, [KD(), averaging, saving], max_epochs=3)
        trainer.fit(module, make_data(8), ckpt_path=ckpt_path)
        return module

    whole = fit()
    path = tmp_path / "step=4.ckpt"
    names = names_in(torch.load(path, weights_only=True))
    assert not [name for name in names if "teacher." in name]
    assert sum("up_proj" in name for name in names) >= 2 * 2  # the current weights, and the average
    assert close(fit(path).student, weights(whole.student))


def test_an_average_continues_in_the_middle_of_an_epoch(tmp_path):
    """The schedule of stochastic weight averaging is the same after a resume at any step."""

    def fit(folder: Path, ckpt_path: Path | None = None) -> dict[str, Tensor]:
        module = make_module()
        averaging = StochasticWeightAveraging(1e-3, swa_epoch_start=2, annealing_epochs=3)
        saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
        trainer = tiny.make_trainer(folder, [KD(), averaging, saving], max_epochs=4)
        trainer.fit(module, make_data(12), ckpt_path=ckpt_path)
        return weights(module.student)

    whole = fit(tmp_path / "whole")
    for step in (1, 4, 5, 7):  # of 3 an epoch; the averaging begins with step 3
        resumed = fit(tmp_path / f"from {step}", tmp_path / "whole" / f"step={step}.ckpt")
        assert all(torch.equal(resumed[name], whole[name]) for name in whole), step


def swa() -> StochasticWeightAveraging:
    return StochasticWeightAveraging(1e-2, swa_epoch_start=1, annealing_epochs=1)


def names_in(value: Any, prefix: str = "") -> list[str]:
    """The names of all tensors in nested mappings."""
    if isinstance(value, Tensor):
        return [prefix]
    if isinstance(value, dict):
        return [n for k, v in value.items() for n in names_in(v, f"{prefix}.{k}")]
    return []
