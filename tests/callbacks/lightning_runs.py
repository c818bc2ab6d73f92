"""Short distillation runs with a callback of Lightning, and records of their effect."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning
import tiny
import torch
from lightning.pytorch.callbacks import (
    BasePredictionWriter,
    Callback,
    Checkpoint,
)
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from okd_lightning import DistillationModule, RolloutDataModule


class Weights(Callback):
    """The student's weights after every step and epoch."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []
        self.epochs: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.steps.append(weights(pl_module.student))

    def on_train_epoch_end(self, trainer, pl_module):
        self.epochs.append(weights(pl_module.student))


@dataclass
class Run:
    """Record of a finished run."""

    trainer: lightning.Trainer
    module: DistillationModule
    data: RolloutDataModule
    callback: Callback
    weights: Weights
    folder: Path
    output: str


@dataclass(frozen=True)
class Case:
    """A callback of Lightning: its constructor, its expected effect, and the Trainer's settings."""

    make: Callable[[Path], Callback]
    effect: Callable[[Run], bool]
    settings: dict[str, Any] = field(default_factory=dict)
    module: type[DistillationModule] = DistillationModule


def weights(model) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def make_module(kind: type[DistillationModule] = DistillationModule, **settings: Any):
    return kind(
        tiny.make_llama(1),
        tiny.make_llama(2, tiny.TEACHER_ROWS),
        tokenizer=tiny.make_tokenizer(),
        learning_rate=1e-2,
        **settings,
    )


def make_data(num_rows: int, val: list[dict[str, Any]] | None = None) -> RolloutDataModule:
    return RolloutDataModule(
        tiny.make_rows(num_rows),
        val,
        batch_size=4,
        max_prompt_length=24,
        max_response_length=24,
        val_rollouts=0,
        token_cache=None,
    )


def run_with(callback: Callback, tmp_path: Path, capfd, case: Case, method: Callback) -> Run:
    module = make_module(case.module)
    data = make_data(8, tiny.make_rows(4, seed=5))
    recorded = Weights()
    trainer = lightning.Trainer(
        callbacks=[recorded, callback, method],
        **{
            "accelerator": "cpu",
            "devices": 1,
            "logger": CSVLogger(tmp_path),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": isinstance(callback, Checkpoint),
            "num_sanity_val_steps": 0,
            "default_root_dir": tmp_path,
            "log_every_n_steps": 1,
            "max_epochs": 2,
            **case.settings,
        },
    )
    trainer.fit(module, data)
    if isinstance(callback, BasePredictionWriter):
        trainer.predict(module, data)
    captured = capfd.readouterr()
    output = captured.out + captured.err
    return Run(trainer, module, data, callback, recorded, tmp_path, output)


def check_teacher(module: DistillationModule) -> None:
    assert module.teacher is not None
    found = {n.replace(".base_layer", ""): p for n, p in module.teacher.named_parameters()}
    for name, value in tiny.make_llama(2, tiny.TEACHER_ROWS).named_parameters():
        assert torch.equal(found[name], value), name


def close(model, wanted: dict[str, Tensor]) -> bool:
    found = weights(model)
    return all(torch.allclose(found[n], w, atol=1e-6) for n, w in wanted.items())
