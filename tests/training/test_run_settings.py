"""Messages of a run about itself, and settings for loggers.

Frozen here: fit prints one line with method, optimizer, rates, schedule, clipping, precision and
device, and one that bf16-mixed is slow on a CPU without AMX; the same values are hyper-parameters
of the module and reach every logger; a subclass's own hyper-parameters stay, and alone are in its
checkpoints.
"""

from __future__ import annotations

from functools import partial

import pytest
import tiny
import torch
import yaml
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from peft import LoraConfig
from torch.optim import SGD
from torch.optim.lr_scheduler import StepLR

from okd_lightning.callbacks import GKD, KD, OKD, Stage
from okd_lightning.training.module import DistillationModule


class Seen(Logger):
    """Logger that keeps its hyper-parameters."""

    name, version = "seen", "0"

    def __init__(self):
        super().__init__()
        self.hparams = []

    def log_hyperparams(self, params, *args, **kwargs):
        self.hparams.append(dict(params))

    def log_metrics(self, metrics, step=None):
        pass


def fit(root, module, method, **settings):
    tiny.fit(root, module, [method], tiny.make_rows(8), max_steps=1, **settings)


def test_loggers_and_the_module_have_them(tmp_path, make_module):
    module = make_module(schedule="cosine", warmup_steps=2, weight_decay=0.1)
    loggers = [Seen(), TensorBoardLogger(tmp_path, default_hp_metric=False)]
    logging = {"logger": loggers, "log_every_n_steps": 1}
    fit(tmp_path, module, GKD(0.3), gradient_clip_val=0.5, **logging)
    (seen,) = loggers[0].hparams
    assert seen["method"] == {
        "gkd": {
            "class": "GKD",
            "beta": 0.3,
            "on_policy_fraction": 0.5,
            "temperature": 1.0,
            "seq_kd": False,
            "weight": 1.0,
        }
    }
    assert {name: value for name, value in seen.items() if name != "method"} == {
        "optimizer": "AdamW",
        "learning_rate": 0.01,
        "weight_decay": 0.1,
        "schedule": "cosine",
        "warmup_steps": 2,
        "gradient_clip_val": 0.5,
        "gradient_clip_algorithm": "norm",
        "accumulate_grad_batches": 1,
        "precision": "32-true",
        "device": "1 x cpu",
    }
    assert dict(module.hparams) == seen
    (file,) = tmp_path.rglob("hparams.yaml")
    assert yaml.safe_load(file.read_text()) == seen


def line(caplog) -> str:
    (found,) = [r.message for r in caplog.records if r.message.startswith("training: ")]
    return found


@pytest.mark.parametrize(
    ("precision", "has_amx", "times"),
    [("bf16-mixed", False, 1), ("bf16-mixed", True, 0), (32, 0, 0)],
)
def test_a_slow_precision_is_reported_once(
    precision, has_amx, times, tmp_path, make_module, caplog
):
    with pytest.MonkeyPatch.context() as patch, caplog.at_level("INFO"):
        patch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: bool(has_amx))
        fit(tmp_path, make_module(), KD(), precision=precision)
    said = [r.getMessage() for r in caplog.records if "slower than float32" in r.getMessage()]
    assert len(said) == times
    assert all("leave --trainer.precision out" in message for message in said)


def test_the_line(tmp_path, make_module, caplog):
    module = make_module(weight_decay=0.1, warmup_steps=2)
    with caplog.at_level("INFO"):
        fit(tmp_path, module, Stage(KD(temperature=2.0)), gradient_clip_val=1.0)
    assert line(caplog) == (
        "training: Stage(method=KD(temperature=2, cross_entropy_weight=0, seq_kd=False, weight=1), "
        "start=0, first_factor=1); AdamW, learning rate 0.01, weight decay 0.1; schedule constant, "
        "warm-up 2 steps; gradient clip 1 (norm); precision 32-true; on 1 x cpu"
    )


def test_the_line_of_an_optimizer_scheduler_and_online_module(tmp_path, make_module, caplog):
    module = make_module(
        learning_rate=None,
        optimizer=partial(SGD, lr=0.25),
        lr_scheduler=partial(StepLR, step_size=3),
    )
    with caplog.at_level("INFO"):
        fit(tmp_path, module, OKD(online_module=LoraConfig(r=4), learning_rate=0.02))
    found = line(caplog)
    assert "online_module=LoraConfig(r=4)" in found
    assert "; SGD, learning rate 0.25, weight decay 0; StepLR(step_size=3" in found
    assert "online module config=LoraConfig(r=4, lora_alpha=4), learning_rate=0.02" in found
    assert "no gradient clipping" in found


class Own(DistillationModule):
    def __init__(self, student, teacher, learning_rate, depth):
        super().__init__(student, teacher, learning_rate=learning_rate)
        self.save_hyperparameters(ignore=["student", "teacher"])


@pytest.mark.parametrize("num_fits", [1, 2])
def test_a_subclasss_own_stay(num_fits, tmp_path, student_folder, teacher_folder):
    module = Own(str(student_folder), str(teacher_folder), learning_rate=0.02, depth=3)
    for _ in range(num_fits):
        trainer = tiny.make_trainer(tmp_path, [KD()], max_steps=1)
        trainer.fit(module, tiny.RolloutDataModule(tiny.make_rows(8), max_response_length=8))
    assert module.hparams["depth"] == 3
    assert module.hparams["optimizer"] == "AdamW"
    trainer.save_checkpoint(tmp_path / "own.ckpt", weights_only=True)
    saved = torch.load(tmp_path / "own.ckpt", weights_only=True)["hyper_parameters"]
    assert saved == {"learning_rate": 0.02, "depth": 3}
