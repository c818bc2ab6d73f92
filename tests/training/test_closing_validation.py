"""The validation after a run's last step.

* A run that ends within its first epoch is validated after its last step, at the interval of
  Lightning's default; a longer one as Lightning does; a second fit of a Trainer likewise.
* A run that ends without a validation says so at its start, with what to change.
* The checkpoint of the last step holds that the validation is due: a run that is killed in it, or
  stopped by a signal, and resumed, takes no step, does that validation and nothing else, and ends
  with the figures, weights, best checkpoint and optimizer state of the run that was not; whether
  steps, a stop request or epochs have ended it; also where it is stopped in it twice.
* A resume whose options leave the validation out ends at once.
"""

from __future__ import annotations

import os
import signal

import pytest
import tiny
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping
from run_comparison import unequal

from okd_lightning.callbacks import KD, BestCheckpoint, LastCheckpoint, Preemption
from okd_lightning.data import RolloutDataModule
from okd_lightning.errors import PreemptedError
from okd_lightning.training.module import DistillationModule

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")


class Killed(Exception):
    """Ends a run in the middle."""


class Seen(Callback):
    """The step of every validation, and the number of training batches."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.num_batches = 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.num_batches += 1

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.steps.append(trainer.global_step)


class Ends(Callback):
    """Ends a run in its n-th batch of validation: by an error or by a signal."""

    def __init__(self, at_step: int, number: int, by: str) -> None:
        self.at_step, self.number, self.by = at_step, number, by

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if trainer.global_step == self.at_step and batch_idx == self.number:
            if self.by == "error":
                raise Killed
            os.kill(os.getpid(), signal.SIGTERM)


class StopsAfter(Callback):
    """Requests the end after a step, and at once in a resumed run, as Lightning's Timer does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_fit_start(self, trainer, pl_module):
        trainer.should_stop = trainer.ckpt_path is not None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.should_stop = trainer.should_stop or trainer.global_step == self.step


def data(val: int | None = 6, rows: int = 8, batch_size: int = 4) -> RolloutDataModule:
    return RolloutDataModule(
        tiny.make_rows(rows),
        None if val is None else tiny.make_rows(val, seed=1),
        batch_size=batch_size,
        max_response_length=6,
        val_rollouts=4,
        seed=3,
    )


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    ("ends", "steps"),
    [
        ({"max_steps": 1}, [1]),
        ({"max_steps": 2}, [2]),  # an epoch
        ({"max_steps": 3}, [2]),
        ({"max_epochs": 2}, [2, 4]),
        ({"max_steps": 1, "limit_val_batches": 0}, []),
        ({"max_steps": 1, "val_check_interval": 2}, []),  # chosen, and reported
        ({"fast_dev_run": 1}, [1]),
    ],
    ids=str,
)
def test_a_run_shorter_than_an_epoch_is_validated_at_its_end(
    tmp_path, make_module, ends, steps, accumulate
):
    seen = Seen()
    settings = {"max_epochs": -1, "accumulate_grad_batches": accumulate, **ends}
    trainer = tiny.make_trainer(tmp_path, [KD(), seen], **settings)
    trainer.fit(make_module(), data(batch_size=4 // accumulate))
    assert seen.steps == steps


def test_a_second_fit_validates_as_its_own_length_needs(tmp_path, make_module):
    seen, module, rows = Seen(), make_module(), data(rows=16)
    trainer = tiny.make_trainer(tmp_path, [KD(), seen], max_steps=1, max_epochs=-1)
    trainer.fit(module, rows)
    trainer.fit_loop.epoch_loop.max_steps = 9
    trainer.fit(module, rows)
    assert seen.steps == [1, 5, 9]  # Lightning begins an epoch, of 4 steps


@pytest.mark.parametrize(
    ("settings", "val", "words"),
    [
        ({}, None, "no validation: give --data.val"),
        ({"limit_val_batches": 0}, 4, "no validation: leave --trainer.limit_val_batches 0 out"),
        ({"limit_val_batches": 0}, None, "no validation: give --data.val"),
        ({"val_check_interval": 9}, 4, "the run ends before step 9, its first one; give --trainer"),
        ({"val_check_interval": 1.0, "max_steps": 1}, 4, None),
        (
            {"val_check_interval": 0.5, "max_steps": 1, "accumulate_grad_batches": 2},
            4,
            None,  # 0.5 epochs of 2 batches are within the step
        ),
        ({"check_val_every_n_epoch": 2}, 4, "the run ends before step 4, its first one"),
        ({"check_val_every_n_epoch": 2, "max_steps": 4}, 4, None),
        ({"val_check_interval": 1}, 4, None),
        ({"val_check_interval": "00:00:30:00"}, 4, None),
        ({"max_steps": -1, "max_epochs": 1}, 4, None),
        ({}, 4, None),
    ],
    ids=str,
)
def test_a_run_without_validation_says_so_at_its_start(
    tmp_path, make_module, caplog, settings, val, words
):
    caplog.set_level("INFO")
    seen = Seen()
    settings = {"max_steps": 2, "max_epochs": -1, **settings}
    trainer = tiny.make_trainer(tmp_path, [KD(), seen], **settings)
    trainer.fit(make_module(), data(val))
    said = [r.getMessage() for r in caplog.records if "no validation" in r.getMessage()]
    assert len(said) == (words is not None)
    assert not words or words in said[0]
    is_timed = settings.get("val_check_interval") == "00:00:30:00"
    assert bool(seen.steps) == (words is None and not is_timed)


STOPPED = {  # the settings, and the last step
    "within an epoch": ({"max_steps": 1}, 1),
    "at an interval": ({"max_steps": 4, "val_check_interval": 2}, 4),
    "within a later epoch": ({"max_steps": 3, "val_check_interval": 1}, 3),
    "an epoch": ({"max_steps": 2}, 2),
    "epochs": ({"max_epochs": 2}, 4),
    "stop request": ({"max_epochs": 2, "stop": 1}, 1),
}


def run(root, folders, more=(), resume=False, stop=None, **settings):
    torch.manual_seed(5)
    module = DistillationModule(*map(str, folders), learning_rate=3e-3, schedule="cosine")
    seen = Seen()
    callbacks = [
        *(KD(), LastCheckpoint(), BestCheckpoint(metric="val/forward_kl"), Preemption(), seen),
        EarlyStopping("val/forward_kl", patience=9),
        *([] if stop is None else [StopsAfter(stop)]),
        *more,
    ]
    settings = {"max_epochs": -1, "accumulate_grad_batches": 2, **settings}
    trainer = tiny.make_trainer(root, callbacks, **settings)
    last = str(root / "checkpoints" / "last.ckpt") if resume else None
    trainer.fit(module, data(batch_size=2), ckpt_path=last)
    return trainer, seen


def state_of(trainer) -> dict:
    path = f"{trainer.default_root_dir}/checkpoints/last.ckpt"
    state = torch.load(path, weights_only=True)
    best = next(v for k, v in state["callbacks"].items() if "BestCheckpoint" in k)
    return {
        "weights": state["state_dict"],
        "optimizer": state["optimizer_states"],
        "rates": state["lr_schedulers"],
        "metrics": state["okd_lightning"]["metrics"],
        "best": float(best["best_model_score"]),
        "waits": [v["wait_count"] for k, v in state["callbacks"].items() if "EarlyStopping" in k],
    }


@pytest.mark.parametrize(
    ("case", "by"),
    [*((case, "error") for case in STOPPED), ("within an epoch", "signal"), ("epochs", "signal")],
)
def test_a_run_stopped_in_its_last_validation_resumes_with_it(
    tmp_path, student_folder, teacher_folder, case, by
):
    settings, last_step = STOPPED[case]
    folders = student_folder, teacher_folder
    whole, whole_seen = run(tmp_path / "whole", folders, **settings)
    stopped = tmp_path / "stopped"
    for number in (0, 1):
        ends = Ends(last_step, number, by)
        with pytest.raises((Killed, PreemptedError)):
            run(stopped, folders, [ends], resume=number == 1, **settings)
    resumed, seen = run(stopped, folders, resume=True, **settings)
    assert seen.num_batches == 0
    assert seen.steps == [last_step] == whole_seen.steps[-1:]
    assert resumed.global_step == whole.global_step == last_step
    assert not list(unequal(state_of(whole), state_of(resumed)))
    for name, value in whole.callback_metrics.items():
        if name.startswith("val/"):
            assert resumed.callback_metrics[name] == value, name


def test_a_resume_without_the_validation_that_was_due_ends(
    tmp_path, student_folder, teacher_folder
):
    folders = student_folder, teacher_folder
    with pytest.raises(Killed):
        run(tmp_path, folders, [Ends(1, 0, "error")], max_steps=1)
    resumed, seen = run(tmp_path, folders, resume=True, max_steps=1, limit_val_batches=0)
    assert (seen.num_batches, seen.steps, resumed.global_step) == (0, [], 1)


def test_a_longer_run_from_a_validation_that_was_due_does_it_first(
    tmp_path, student_folder, teacher_folder
):
    folders = student_folder, teacher_folder
    with pytest.raises(Killed):
        run(tmp_path, folders, [Ends(1, 0, "error")], max_steps=1)
    resumed, seen = run(tmp_path, folders, resume=True, max_steps=4)
    assert seen.steps == [1, 2, 4]
    assert resumed.global_step == 4
