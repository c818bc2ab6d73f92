"""Precedence between two options for one rate, and the optimizer's parameter groups.

Frozen here: learning_rate and weight_decay are the lr and weight_decay of any optimizer; an
optimizer's own values count where the module has none; two values for one quantity are refused, and
so is a decay that the optimizer does not have; biases and norms are not decayed with any optimizer;
the groups have names; a scheduler class of the user's decides the rates, and schedule and
warmup_steps with it are refused.
"""

from __future__ import annotations

from functools import partial

import pytest
import tiny
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import ReduceLROnPlateau
from torch.optim import SGD, AdamW, Rprop
from torch.optim.lr_scheduler import ReduceLROnPlateau as TorchPlateau
from torch.optim.lr_scheduler import StepLR

from okd_lightning.callbacks import KD, OKD
from okd_lightning.data import RolloutDataModule
from okd_lightning.errors import ConfigError
from okd_lightning.training.optimizer_settings import optimizer_settings
from okd_lightning.training.optimizers import build_optimizer


@pytest.mark.parametrize(
    ("given", "optimizer", "expected"),
    [
        ((None, None), None, (5e-5, 0.0)),
        ((1e-3, 0.1), None, (1e-3, 0.1)),
        ((None, None), AdamW, (5e-5, 0.0)),
        ((1e-4, 0.2), AdamW, (1e-4, 0.2)),
        ((1e-4, None), partial(AdamW, betas=(0.8, 0.9)), (1e-4, 0.0)),
        ((None, None), partial(SGD, lr=0.3, weight_decay=0.1), (0.3, 0.1)),
        ((None, 0.1), partial(SGD, lr=1e-3), (1e-3, 0.1)),  # lr given, though it is SGD's default
        ((0.3, None), partial(SGD, lr=0.3), (0.3, 0.0)),
        ((None, None), lambda p: AdamW(p), (1e-3, 0.01)),
        ((None, None), lambda p: SGD(p, lr=0.25), (0.25, 0.0)),
        ((1e-4, None), lambda p: AdamW(p, betas=(0.8, 0.9)), (1e-4, 0.01)),
        ((None, None), partial(Rprop, lr=0.1), (0.1, 0.0)),
    ],
)
def test_the_rate_and_decay_of_an_optimizer(given, optimizer, expected):
    settings = optimizer_settings(*given, optimizer)
    assert (settings.learning_rate, settings.weight_decay) == expected


@pytest.mark.parametrize(
    ("given", "optimizer", "message"),
    [
        ((1e-4, None), partial(SGD, lr=0.3), r"learning_rate 0\.0001 and .* lr 0\.3.*leave one"),
        ((5e-5, None), partial(SGD, lr=1e-3), r"learning_rate 5e-05 and"),
        ((None, 0.1), partial(AdamW, weight_decay=0.01), r"weight_decay 0\.1 and"),
        ((None, 0.1), Rprop, r"weight_decay 0\.1: Rprop has no weight_decay; leave it out"),
        ((-1.0, None), None, r"learning_rate must be a number from 0 on, got -1"),
        ((None, float("nan")), AdamW, r"weight_decay must be a number from 0 on"),
        ((None, None), lambda p: None, r"returned a NoneType; expected a torch Optimizer"),
        ((None, None), torch.optim.LBFGS, r"cannot be built from parameter groups"),
        ((None, None), torch.optim.SparseAdam, r"SparseAdam takes sparse gradients alone"),
    ],
)
def test_what_cannot_act_is_refused(given, optimizer, message):
    with pytest.raises(ConfigError, match=message):
        optimizer_settings(*given, optimizer)


def test_a_functions_own_rate_counts_and_is_said(caplog):
    with caplog.at_level("INFO"):
        assert optimizer_settings(1e-2, None, lambda p: SGD(p, lr=0.25)).learning_rate == 0.25
    assert "learning_rate 0.01 is ignored" in caplog.text


class Groups(Callback):
    """The settings of every group in every step."""

    def __init__(self):
        self.seen = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen.append({group["name"]: dict(group) for group in optimizer.param_groups})


def train(root, module, method=None, **settings):
    groups = Groups()
    trainer = tiny.make_trainer(root, [method or KD(), groups], **settings)
    trainer.fit(module, RolloutDataModule(tiny.make_rows(12), batch_size=4, max_response_length=8))
    return groups.seen, trainer


@pytest.mark.parametrize("optimizer", [None, AdamW, partial(SGD, momentum=0.9)])
def test_groups_are_named_and_only_matrices_decay(optimizer, tmp_path, make_module):
    module = make_module(optimizer=optimizer, learning_rate=3e-3, weight_decay=0.1)
    seen, _ = train(tmp_path, module)
    groups = seen[0]
    assert list(groups) == ["student/decay", "student/no_decay"]
    assert all(p.ndim >= 2 for p in groups["student/decay"]["params"])
    assert all(p.ndim < 2 for p in groups["student/no_decay"]["params"])
    assert [group["weight_decay"] for group in groups.values()] == [0.1, 0.0]
    assert {group["lr"] for group in groups.values()} == {3e-3}


def test_adamw_is_one_kernel():
    trained = []
    for factory in (None, partial(AdamW, fused=False)):
        weights = [torch.nn.Parameter(torch.linspace(-1, 1, 35).reshape(5, 7))]
        optimizer = build_optimizer(weights, [], 1e-2, 0.1, factory=factory)
        assert [group["fused"] for group in optimizer.param_groups] == [factory is None]
        for step in range(3):
            weights[0].grad = torch.cos(weights[0].detach() * (step + 1))
            optimizer.step()
        trained.append(weights[0].detach())
    torch.testing.assert_close(*trained, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("optimizer", [None, partial(AdamW, fused=True)])
def test_a_fused_optimizer_clips_in_mixed_precision(optimizer, tmp_path, make_module):
    module = make_module(optimizer=optimizer, learning_rate=1e-2)
    settings = {"max_steps": 1, "precision": "bf16-mixed", "gradient_clip_val": 1.0}
    seen, trainer = train(tmp_path, module, **settings)
    assert trainer.global_step == 1
    assert all(group["fused"] for group in seen[0].values())


def test_the_online_modules_group(tmp_path, make_module, lora):
    method = OKD(online_module=lora, learning_rate=0.02)
    module = make_module(optimizer=SGD, learning_rate=1e-3, weight_decay=0.1)
    groups = train(tmp_path, module, method)[0][0]
    assert groups["online_module"]["lr"] == 0.02
    assert groups["online_module"]["weight_decay"] == 0.0


@pytest.fixture
def lora():
    from peft import LoraConfig

    return LoraConfig(r=2)


def test_a_scheduler_of_the_users_decides_the_rates(tmp_path, make_module):
    module = make_module(learning_rate=1.0e-2, lr_scheduler=partial(StepLR, step_size=1, gamma=0.5))
    seen, _ = train(tmp_path, module)
    assert [step["student/decay"]["lr"] for step in seen] == [1e-2, 5e-3, 2.5e-3]


def test_a_plateau_watches_its_monitor(tmp_path, make_module):
    plateau = partial(ReduceLROnPlateau, monitor="train/kd", factor=0.5, patience=0, threshold=1e9)
    seen, trainer = train(tmp_path, make_module(lr_scheduler=plateau), max_epochs=3)
    assert seen[-1]["student/decay"]["lr"] < seen[0]["student/decay"]["lr"]
    assert trainer.lr_scheduler_configs[0].monitor == "train/kd"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"warmup_steps": 3}, r"model\.warmup_steps 3 has no effect with model\.lr_scheduler"),
        ({"schedule": "cosine"}, r"model\.schedule cosine has no effect"),
        ({"lr_scheduler": TorchPlateau}, r"use lightning\.pytorch\.cli\.ReduceLROnPlateau"),
        ({"lr_scheduler": StepLR}, r"model\.lr_scheduler cannot be built"),
        ({"lr_scheduler": lambda _: 3}, r"returned a int; expected a scheduler"),
    ],
)
def test_a_scheduler_that_cannot_act_is_refused(settings, message, make_module):
    with pytest.raises(ConfigError, match=message):
        make_module(**{"lr_scheduler": partial(StepLR, step_size=1), **settings})


def test_the_online_modules_schedule_next_to_a_users_scheduler(tmp_path, make_module, lora):
    module = make_module(lr_scheduler=partial(StepLR, step_size=1))
    with pytest.raises(ConfigError, match=r"method\.warmup_steps 2 has no effect"):
        train(tmp_path, module, OKD(online_module=lora, warmup_steps=2))
