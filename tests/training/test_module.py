"""The DistillationModule on a Trainer.

Frozen here: who is in which mode and who gets gradients; optimizer groups and the rate of every
step; terms come and go with their Trainer, also after a run that failed; whatever a user overrides
is used; settings that cannot work are refused by name, what they name instead trains; batches that
are none of ours are refused; other precisions give the same loss.
"""

from __future__ import annotations

import copy

import lightning
import pytest
import tiny
import torch
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler
from torch.utils.data import DataLoader, TensorDataset

from okd_lightning.callbacks import (
    GKD,
    KD,
    SFT,
    Throughput,
)
from okd_lightning.data import RolloutDataModule
from okd_lightning.divergences import ForwardKL
from okd_lightning.engines import TransformersEngine
from okd_lightning.errors import ConfigError
from okd_lightning.losses import ExactDivergence
from okd_lightning.training.module import DistillationModule


class Modes(Callback):
    """Record of the models in training mode, in training and during generation."""

    def __init__(self):
        self.training, self.writing = set(), set()

    def setup(self, trainer, pl_module, stage):
        respond = TransformersEngine.respond

        def watched(engine, *args, **kwargs):
            self.writing.add(any(m.training for m in engine.model.modules()))
            return respond(engine, *args, **kwargs)

        self.restore = (TransformersEngine, respond)
        TransformersEngine.respond = watched

    def teardown(self, trainer, pl_module, stage):
        TransformersEngine.respond = self.restore[1]

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        self.training.add(
            (
                all(m.training for m in pl_module.student.modules()),
                any(m.training for m in pl_module.teacher.modules()),
            )
        )


def test_modes_gradients_and_the_untouched_teacher(tmp_path, make_module, dropout_folder):
    module = make_module(student=str(dropout_folder))
    module.configure_model()
    before = copy.deepcopy(module.teacher.state_dict())
    modes = Modes()
    recorder = tiny.fit(
        tmp_path,
        module,
        [GKD(on_policy_fraction=0.5, seq_kd=True)],
        tiny.make_rows(24),
        val=tiny.make_rows(4),
        callbacks=[modes],
        data={"val_rollouts": 2},
        max_epochs=2,
        val_check_interval=2,
    )
    assert set.union(*recorder.sources()) == {1, 2}
    assert modes.training == {(True, False)}
    assert modes.writing == {False}
    after = module.teacher.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(p.grad is None and not p.requires_grad for p in module.teacher.parameters())
    assert all(n.startswith("student.") for n in recorder.gradients[0])
    module.train()
    assert not module.teacher.training
    assert module.student.training


def test_dropout_is_on_in_training_and_off_in_rollouts(tmp_path, make_module, dropout_folder):
    def losses(seed, method):
        torch.manual_seed(seed)
        module = make_module(student=str(dropout_folder), learning_rate=0.0)
        return tiny.fit(tmp_path, module, [method], tiny.make_rows(8))

    assert losses(0, KD()).losses != losses(1, KD()).losses
    assert losses(0, KD()).losses == losses(0, KD()).losses
    a, b = (losses(seed, GKD(on_policy_fraction=1.0)) for seed in (0, 1))
    assert [a.rows(i) for i in range(2)] == [b.rows(i) for i in range(2)]


def test_decay_is_on_matrices_only_and_every_weight_is_in_the_optimizer(tmp_path, make_module):
    module = make_module(weight_decay=0.1, learning_rate=3e-3)
    trainer = tiny.make_trainer(tmp_path, [KD()])
    trainer.fit(module, RolloutDataModule(tiny.make_rows(4), max_response_length=8))
    (optimizer,) = trainer.optimizers
    groups = {group["weight_decay"]: group["params"] for group in optimizer.param_groups}
    assert set(groups) == {0.1, 0.0}
    assert all(p.ndim >= 2 for p in groups[0.1])
    assert all(p.ndim < 2 for p in groups[0.0])
    wanted = {id(p) for p in module.student.parameters()}
    assert {id(p) for group in groups.values() for p in group} == wanted


class Rates(Callback):
    def __init__(self):
        self.seen = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen.append(optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_rate_of_every_step(accumulate, tmp_path, make_module):
    rates = Rates()
    module = make_module(learning_rate=0.1, warmup_steps=2, schedule="linear")
    tiny.fit(
        tmp_path,
        module,
        [KD()],
        tiny.make_rows(12 * accumulate),
        callbacks=[rates],
        max_epochs=2,
        accumulate_grad_batches=accumulate,
    )
    assert rates.seen == pytest.approx([0.05, 0.1, 0.1, 0.075, 0.05, 0.025])


def test_a_run_without_an_end(tmp_path, make_module):
    class Stop(Callback):
        def on_train_batch_end(self, trainer, *args):
            trainer.should_stop = trainer.global_step == 3

    tiny.fit(tmp_path, make_module(), [KD()], tiny.make_rows(8), callbacks=[Stop()], max_epochs=-1)
    with pytest.raises(ConfigError, match="schedule"):
        tiny.fit(
            tmp_path,
            make_module(schedule="cosine"),
            [KD()],
            tiny.make_rows(8),
            callbacks=[Stop()],
            max_epochs=-1,
        )


def test_an_unknown_schedule_is_refused(make_module):
    with pytest.raises(ConfigError, match="schedule"):
        make_module(schedule="linaer")


def test_accumulation_that_changes_is_refused(tmp_path, make_module):
    with pytest.raises(ConfigError, match="GradientAccumulationScheduler"):
        tiny.fit(
            tmp_path,
            make_module(),
            [KD()],
            tiny.make_rows(16),
            callbacks=[GradientAccumulationScheduler({1: 2})],
            max_epochs=2,
        )


# ---------------------------------------------------------------- terms


def test_two_terms_of_one_name_are_refused(tmp_path, make_module):
    with pytest.raises(ConfigError, match="two methods of this run are called 'kd'"):
        tiny.fit(tmp_path, make_module(), [KD(), KD(temperature=2.0)], tiny.make_rows(4))


@pytest.mark.parametrize("method", [KD(), GKD(), SFT(seq_kd=True)])
def test_a_missing_teacher_is_named(method, tmp_path, make_module):
    with pytest.raises(ConfigError, match=f"method {method.name} needs a teacher.*--model.teacher"):
        tiny.fit(tmp_path, make_module(teacher=None), [method], tiny.make_rows(4))


def test_sft_needs_no_teacher(tmp_path, make_module):
    module = make_module(teacher=None)
    recorder = tiny.fit(
        tmp_path, module, [SFT()], tiny.make_rows(8), val=tiny.make_rows(3), max_epochs=5
    )
    assert recorder.losses[-1]["train/loss"] < recorder.losses[0]["train/loss"]


def test_no_method_is_an_error(tmp_path, make_module):
    with pytest.raises(ConfigError, match="no method is configured"):
        tiny.fit(tmp_path, make_module(), [], tiny.make_rows(4))


def test_a_method_needs_a_distillation_module(tmp_path):
    class Other(lightning.LightningModule):
        pass

    with pytest.raises(ConfigError, match="KD works on a DistillationModule"):
        KD().setup(tiny.make_trainer(tmp_path), Other(), "fit")


def test_terms_go_with_their_trainer(tmp_path, make_module):
    module = make_module()
    tiny.fit(tmp_path, module, [KD(name="first")], tiny.make_rows(4))
    recorder = tiny.fit(tmp_path, module, [KD(name="second")], tiny.make_rows(4))
    assert set(recorder.losses[0]) >= {"train/second", "train/loss"}
    assert "train/first" not in recorder.losses[0]


def test_terms_of_a_run_that_failed_are_gone(tmp_path, make_module):
    class Fail(Callback):
        def on_train_start(self, trainer, pl_module):
            raise RuntimeError("on purpose")

    module = make_module()
    with pytest.raises(RuntimeError, match="on purpose"):
        tiny.fit(tmp_path, module, [KD()], tiny.make_rows(4), callbacks=[Fail()])
    recorder = tiny.fit(tmp_path, module, [KD(temperature=2.0)], tiny.make_rows(4))
    assert recorder.losses


def test_the_same_trainer_can_fit_again(tmp_path, make_module):
    module, trainer = make_module(), tiny.make_trainer(tmp_path, [KD()])
    data = RolloutDataModule(tiny.make_rows(8), batch_size=4, max_response_length=8)
    trainer.fit(module, data)
    before = tiny.weights(module)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, data)
    assert trainer.global_step == 4
    assert tiny.distance(tiny.weights(module), before) > 0


def test_student_and_teacher_that_are_one_object_are_refused(tiny_pair, tiny_tokenizer):
    with pytest.raises(ConfigError, match="the same"):
        DistillationModule(tiny_pair[0], tiny_pair[0], tokenizer=tiny_tokenizer)


# ---------------------------------------------------------------- what Lightning alone would take


def compiled_in_place(module):
    module.compile(backend="eager")
    return module


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method")  # torch's own, at its import
@pytest.mark.parametrize(
    "wrap", [lambda m: torch.compile(m, backend="eager"), compiled_in_place], ids=["wrapped", "own"]
)
def test_a_compiled_module_names_compile_blocks(wrap, tmp_path, make_module):
    with pytest.raises(ConfigError, match=r"torch\.compile.*or compile_blocks=True\)$"):
        tiny.fit(tmp_path, wrap(make_module()), [KD()], tiny.make_rows(4))
    with torch.compiler.set_stance("force_eager"):  # without a compiler
        module = make_module(compile_blocks=True)
        recorder = tiny.fit(tmp_path, module, [KD()], tiny.make_rows(4))
    assert recorder.losses


FOREIGN = {
    "mappings": lambda: DataLoader([{"prompt": "a", "response": "b"}] * 4, batch_size=2),
    "a tensor": lambda: DataLoader(torch.ones(4, 2)),
    "a list of lists": lambda: [[1, 2], [3, 4]],
    "pairs of tensors": lambda: DataLoader(TensorDataset(torch.ones(4, 2), torch.ones(4))),
}


@pytest.mark.parametrize("run", ["fit", "validate", "test", "predict"])
@pytest.mark.parametrize("name", FOREIGN)
def test_a_batch_of_another_loader_is_refused(name, run, tmp_path, make_module):
    trainer = tiny.make_trainer(tmp_path, [KD(), Throughput()], num_sanity_val_steps=0)
    loaders = [FOREIGN[name]() for _ in range(2 if run == "fit" else 1)]
    with pytest.raises(ConfigError, match="expected a DistillBatch: fit on a RolloutDataModule"):
        getattr(trainer, run)(make_module(), *loaders)


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
def test_true_precisions_are_refused(precision, tmp_path, make_module):
    with pytest.raises(ConfigError, match=r"--model\.dtype bfloat16"):
        tiny.fit(tmp_path, make_module(), [KD()], tiny.make_rows(8), precision=precision)


@pytest.mark.parametrize("precision", ["bf16-mixed"])
@pytest.mark.parametrize(
    "method", [lambda: KD(temperature=2.0), lambda: GKD(on_policy_fraction=1.0)]
)
def test_other_precisions_give_nearly_the_same_loss(precision, method, tmp_path, make_module):
    exact = tiny.fit(tmp_path, make_module(), [KD(temperature=2.0)], tiny.make_rows(8))
    found = tiny.fit(tmp_path, make_module(), [method()], tiny.make_rows(8), precision=precision)
    if "kd" in exact.losses[0] and "train/kd" in found.losses[0]:
        assert found.losses[0]["train/kd"] == pytest.approx(exact.losses[0]["train/kd"], rel=0.02)
    assert all(0 < losses["train/loss"] < 10 for losses in found.losses)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_logged_loss_is_the_mean_over_the_steps_tokens(accumulate, tmp_path, make_module):
    """The value is neither the last micro-batch's nor a mean of means over the epoch."""

    class ByHand(Callback):
        def __init__(self):
            self.sums, self.counts, self.found = 0.0, 0, []

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            with torch.no_grad():
                values = pl_module.measure(batch, [ExactDivergence(ForwardKL())])
            (values,) = values.values.values()
            self.sums, self.counts = self.sums + float(values.sum()), self.counts + len(values)
            if (batch_idx + 1) % accumulate == 0:
                self.found.append(self.sums / self.counts)
                self.sums, self.counts = 0.0, 0

    by_hand = ByHand()
    recorder = tiny.fit(
        tmp_path,
        make_module(learning_rate=0.0),
        [KD()],
        tiny.make_rows(20),
        callbacks=[by_hand],
        accumulate_grad_batches=accumulate,
    )
    assert [losses["train/loss"] for losses in recorder.losses] == pytest.approx(
        by_hand.found, rel=1e-5
    )


def test_it_learns(tmp_path, make_module):
    """Training on the teacher's responses makes the student equal to the teacher."""
    recorder = tiny.fit(
        tmp_path,
        make_module(),
        [GKD(0.0, on_policy_fraction=0.5, seq_kd=True)],
        tiny.make_rows(32),
        max_epochs=20,
        data={"batch_size": 8},
    )
    first = sum(losses["train/loss"] for losses in recorder.losses[:8])
    last = sum(losses["train/loss"] for losses in recorder.losses[-8:])
    assert last < 0.6 * first
