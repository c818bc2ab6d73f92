"""A user's own classes in a run.

Frozen here: an own divergence, method, engine, module and optimizer train as ours do.
"""

from __future__ import annotations

from dataclasses import dataclass

import tiny
import torch
from lightning.pytorch.callbacks import LambdaCallback
from torch import Tensor

from okd_lightning.callbacks import (
    GKD,
    KD,
    DistillationCallback,
    DivergenceCallback,
)
from okd_lightning.data import RolloutDataModule
from okd_lightning.divergences import Divergence, ForwardKL
from okd_lightning.losses import Entropy, ExactDivergence, Measured
from okd_lightning.losses.reduction import loss_output
from okd_lightning.records import LossOutput, Response, Rollout
from okd_lightning.training.module import DistillationModule


@dataclass(frozen=True)
class Triangular(Divergence):
    """Ten lines of a user's."""

    def generator(self, log_ratio: Tensor) -> Tensor:
        return log_ratio.expm1() * (log_ratio / 2).tanh()


def test_a_users_divergence_trains(tmp_path, make_module):
    method = DivergenceCallback(Triangular())
    recorder = tiny.fit(tmp_path, make_module(), [method], tiny.make_rows(16), max_epochs=10)
    assert recorder.losses[-1]["train/loss"] < 0.5 * recorder.losses[0]["train/loss"]


class TopMass(DistillationCallback):
    """The example of the docstring of DistillationCallback."""

    on_policy_fraction = 0.0
    sources = ("dataset",)
    quantities = (ExactDivergence(ForwardKL()), Entropy("teacher"))

    def loss(self, measured: Measured) -> LossOutput:
        divergence, entropy = (measured[q] for q in self.quantities)
        values = divergence * (-entropy.detach()).exp()
        return loss_output(values, measured.mask(self.sources), entropy=entropy)


def test_a_users_method_trains_and_logs(tmp_path, make_module):
    recorder = tiny.fit(tmp_path, make_module(), [TopMass()], tiny.make_rows(16), max_epochs=10)
    first, last = recorder.losses[0], recorder.losses[-1]
    assert last["train/top_mass"] < 0.5 * first["train/top_mass"]
    assert first["train/top_mass"] == first["train/loss"]
    assert 0 < first["train/entropy"] < torch.log(torch.tensor(19.0))


class Parrot:
    """A user's engine: repeats the prompt."""

    def respond(self, request):
        found = [(*prompt.ids[:3], tiny.EOS) for prompt in request.prompts]
        return Rollout(tuple(Response(ids, (0.0,) * len(ids), "eos") for ids in found))


class Mine(DistillationModule):
    """Overrides what Lightning and we offer."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("train/mine", 2.0)
        return loss + 0.0 * sum(p.sum() for p in self.student.parameters())

    def configure_optimizers(self):
        return torch.optim.SGD(self.student.parameters(), lr=0.5)

    def build_engine(self, model):
        return Parrot()


def test_a_subclass_is_used(tmp_path, student_folder, teacher_folder):
    module = Mine(str(student_folder), str(teacher_folder))
    method, rates = GKD(on_policy_fraction=1.0), []
    seen = LambdaCallback(
        on_before_optimizer_step=lambda trainer, module, optimizer: rates.append(
            optimizer.param_groups[0]["lr"]
        )
    )
    recorder = tiny.fit(tmp_path, module, [method], tiny.make_rows(8), callbacks=[seen])
    assert recorder.losses[0]["train/mine"] == 2.0
    assert rates == [0.5, 0.5]
    for batch in recorder.steps[0]:
        for i, start in enumerate(batch.prompt_lengths.tolist()):
            row = batch.input_ids[i, : batch.lengths[i]].tolist()
            assert row[start:] == [*row[:start][:3], tiny.EOS]


def test_a_users_optimizer_is_given_the_trainable_weights(tmp_path, make_module):
    module = make_module(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.25))
    trainer = tiny.make_trainer(tmp_path, [KD()])
    trainer.fit(module, RolloutDataModule(tiny.make_rows(4), max_response_length=8))
    assert isinstance(trainer.optimizers[0], torch.optim.SGD)
