"""Checkpoints and killed runs.

Frozen here: a run that was killed at any moment and resumed from its last checkpoint ends with the
weights, optimizer state and losses of the run that was not, bit for bit, with dropout,
accumulation, several optimizer steps a rollout chunk and GKD's coin; what a checkpoint holds; whose
checkpoint is refused.
"""

from __future__ import annotations

import contextlib

import pytest
import tiny
import torch
from lightning.pytorch.callbacks import Callback
from peft import LoraConfig

from okd_lightning.callbacks import GKD, KD, SFT, ExactMatch, LastCheckpoint, RolloutLog, Throughput
from okd_lightning.data import RolloutDataModule
from okd_lightning.errors import CheckpointError
from okd_lightning.models.text_ids import RULES_VERSION
from okd_lightning.training.module import DistillationModule

SHORT = {"max_response_length": 8, "val_rollouts": 0}


class Killed(Exception):
    """What ends a run in the middle."""


class Killer(Callback):
    """Raises at the n-th call of one hook."""

    def __init__(self, hook: str, number: int) -> None:
        self.calls, self.number = 0, number
        setattr(self, hook, self.count)

    def count(self, trainer, *args, **kwargs) -> None:
        if not trainer.sanity_checking:
            self.calls += 1
            if self.calls == self.number:
                raise Killed


class Losses(Callback):
    """Every logged loss by (epoch, batch), so that a resumed run can be laid over another."""

    def __init__(self) -> None:
        self.seen: dict[tuple[int, int], float] = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen[trainer.current_epoch, batch_idx] = float(outputs["loss"])


def train(root, folders, killer=None, ckpt_path=None, every_n_steps=1, val=None, **settings):
    """Two epochs of 5 optimizer steps of 2 micro-batches; the last step is short."""
    student, teacher = folders
    torch.manual_seed(11)
    module = DistillationModule(
        str(student), str(teacher), learning_rate=3e-3, warmup_steps=3, schedule="cosine"
    )
    losses = Losses()
    callbacks = [
        GKD(0.5, on_policy_fraction=0.5),
        LastCheckpoint(every_n_steps=every_n_steps),
        losses,
        *([killer] if killer else []),
    ]
    trainer = tiny.make_trainer(
        root, callbacks, accumulate_grad_batches=2, max_epochs=2, gradient_clip_val=1.0, **settings
    )
    data = RolloutDataModule(
        tiny.make_rows(19),
        val,
        batch_size=2,
        max_response_length=6,
        prompts_per_rollout=8,
        seed=7,
        **({} if val is None else {"val_rollouts": 2}),
    )
    try:
        trainer.fit(module, data, ckpt_path=ckpt_path)
    except Killed:
        assert killer is not None
    return module, trainer, losses.seen


@pytest.fixture(scope="module")
def folders(dropout_folder, teacher_folder):
    return dropout_folder, teacher_folder


@pytest.fixture(scope="module")
def truth(folders, tmp_path_factory):
    module, trainer, losses = train(tmp_path_factory.mktemp("truth"), folders)
    assert trainer.global_step == 10
    return tiny.weights(module), trainer.optimizers[0].state_dict(), losses


def check_identical(found, truth, resumed_losses) -> None:
    module, trainer = found
    weights, optimizer, losses = truth
    assert trainer.global_step == 10
    for name, weight in tiny.weights(module).items():
        assert torch.equal(weight, weights[name]), name
    for i, state in trainer.optimizers[0].state_dict()["state"].items():
        for name, value in state.items():
            assert torch.equal(value, optimizer["state"][i][name]), (i, name)
    assert resumed_losses
    assert resumed_losses == {at: losses[at] for at in resumed_losses}


MOMENTS = [
    *(("on_train_batch_start", n) for n in (2, 3, 4, 5, 8, 11, 12, 15, 20)),
    *(("on_train_batch_end", n) for n in (2, 6, 10, 19, 20)),
    *(("on_before_optimizer_step", n) for n in (2, 5, 6)),
    ("on_train_epoch_end", 1),
    ("on_train_epoch_start", 2),
    ("on_train_epoch_end", 2),
]


@pytest.mark.parametrize(("hook", "number"), MOMENTS)
def test_a_killed_run_ends_like_the_other(hook, number, folders, truth, tmp_path):
    train(tmp_path, folders, Killer(hook, number))
    last = tmp_path / "checkpoints" / "last.ckpt"
    if not last.exists():
        assert (hook, number) in (("on_train_batch_start", 2), ("on_train_batch_end", 2))
        return
    assert torch.load(last, weights_only=True)["global_step"] >= 1
    torch.manual_seed(99)  # whatever the new process did before
    module, trainer, losses = train(tmp_path, folders, ckpt_path=str(last))
    if trainer.global_step == 10 and not losses:
        assert (hook, number) in (("on_train_epoch_end", 2), ("on_train_batch_end", 20))
        losses = truth[2]
    check_identical((module, trainer), truth, losses)


@pytest.mark.parametrize("number", [11, 12, 15])
def test_a_run_whose_last_checkpoint_is_an_epochs_end(number, folders, truth, tmp_path):
    """Lightning gives a loader its state back only in the middle of an epoch."""
    train(tmp_path, folders, Killer("on_train_batch_start", number), every_n_steps=None)
    last = str(tmp_path / "checkpoints" / "last.ckpt")
    module, trainer, losses = train(tmp_path, folders, None, last, None)
    assert len(losses) == 10
    check_identical((module, trainer), truth, losses)


@pytest.mark.parametrize("val_check_interval", [None, 4])
@pytest.mark.parametrize("max_steps", [-1, 99], ids=["by epochs", "by steps"])
def test_a_finished_run_goes_on_with_more_epochs(val_check_interval, max_steps, folders, tmp_path):
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


def test_no_checkpoint_is_half_of_a_step(folders, tmp_path):
    """Validation after 3 micro-batches of 2 a step: its gradient would be lost."""
    states = []

    class Keep(LastCheckpoint):
        def _save(self, trainer):
            super()._save(trainer)
            if self.path.exists():
                states.append(torch.load(self.path, weights_only=True))

    module = DistillationModule(*map(str, folders))
    trainer = tiny.make_trainer(
        tmp_path, [KD(), Keep(1)], accumulate_grad_batches=2, val_check_interval=3
    )
    data = RolloutDataModule(tiny.make_rows(16), tiny.make_rows(3), batch_size=2, seed=7, **SHORT)
    trainer.fit(module, data)
    assert {state["global_step"] for state in states} == {1, 2, 3, 4}
    for state in states:
        (loader,) = state["loops"]["fit_loop"]["state_dict"]["combined_loader"]
        assert loader["delivered"] == 2 * state["global_step"]


@pytest.mark.parametrize("every_n_steps", [2, 3])
def test_a_run_that_is_killed_again_and_again(every_n_steps, folders, truth, tmp_path):
    """Also right after a resume, where no new checkpoint may be half of a step."""
    last = tmp_path / "checkpoints" / "last.ckpt"
    train(tmp_path, folders, Killer("on_train_batch_start", 8), every_n_steps=every_n_steps)
    for number in (2, 2, 3, 8):
        killer = Killer("on_train_batch_start", number)
        train(tmp_path, folders, killer, str(last), every_n_steps)
    module, trainer, losses = train(tmp_path, folders, None, str(last), every_n_steps)
    check_identical((module, trainer), truth, losses)


@pytest.mark.parametrize(
    ("hook", "number"),
    [
        ("on_validation_start", 1),
        ("on_validation_end", 1),
        ("on_train_batch_start", 9),
        ("on_validation_end", 2),
        ("on_train_epoch_end", 1),
        ("on_train_batch_start", 11),
        ("on_train_batch_start", 13),
    ],
)
@pytest.mark.parametrize("interval", [1.0, 4], ids=["every epoch", "in the middle"])
@pytest.mark.parametrize("every", [None, 2])
def test_validation_does_not_disturb_a_resume(
    hook, number, interval, every, folders, truth, tmp_path
):
    settings = {"val": tiny.make_rows(4, seed=1), "val_check_interval": interval}
    train(tmp_path, folders, Killer(hook, number), every_n_steps=every, **settings)
    if not (tmp_path / "checkpoints" / "last.ckpt").exists():
        assert every is None or interval == 4  # none is written before a validation that is due
        assert (hook, number) in (
            ("on_validation_start", 1),
            ("on_validation_end", 1),
            ("on_train_batch_start", 9),
        )
        return
    last = str(tmp_path / "checkpoints" / "last.ckpt")
    module, trainer, losses = train(tmp_path, folders, ckpt_path=last, **settings)
    assert losses or (hook, number) == ("on_validation_end", 2)
    check_identical((module, trainer), truth, losses or truth[2])


TWICE = [
    ("on_train_batch_start", 4),
    ("on_train_batch_end", 10),  # the end of an epoch
    ("on_train_epoch_end", 1),
    ("on_train_epoch_start", 2),
    ("on_train_batch_start", 12),  # within the second epoch
]
AGAIN = [("on_train_batch_start", 3), ("on_train_epoch_end", 1)]


@pytest.mark.parametrize("first", TWICE, ids=str)
@pytest.mark.parametrize("second", AGAIN, ids=str)
def test_a_run_that_is_killed_twice_trains_its_epochs(first, second, folders, truth, tmp_path):
    """Lightning counts an epoch that a resumed run begins in one of its two counters alone."""
    last, seen = tmp_path / "checkpoints" / "last.ckpt", {}
    for place in (first, second, None):
        killer = None if place is None else Killer(*place)
        path = str(last) if last.exists() else None
        module, trainer, losses = train(tmp_path, folders, killer, path)
        seen |= losses
    assert {epoch for epoch, _ in seen} == {0, 1}
    check_identical((module, trainer), truth, losses or seen)


def test_what_a_checkpoint_holds(folders, tmp_path):
    module, _, _ = train(tmp_path, folders, val=tiny.make_rows(3))
    checkpoint = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    names = set(checkpoint["state_dict"])
    student = {f"student.{name}" for name in module.student.state_dict()}
    assert student <= names
    assert not any("teacher" in name for name in names)
    assert all(name in student or name.startswith("evaluation.") for name in names)
    assert checkpoint["okd_lightning"]["methods"] == ["GKD"]
    assert {"val/forward_kl", "val/agreement"} <= set(checkpoint["okd_lightning"]["metrics"])


def save(root, module, methods) -> str:
    trainer = tiny.make_trainer(root, [*methods, LastCheckpoint()], max_steps=1)
    trainer.fit(module, RolloutDataModule(tiny.make_rows(4), batch_size=4, seed=7, **SHORT))
    return str(root / "checkpoints" / "last.ckpt")


def test_loaded_models_are_saved_once_and_the_teacher_not(tmp_path, tiny_pair, tiny_tokenizer):
    module = DistillationModule(*tiny_pair, tokenizer=tiny_tokenizer)
    path = save(tmp_path, module, [KD()])
    names = torch.load(path, weights_only=True)["state_dict"]
    wanted = {f"student.{name}" for name in tiny_pair[0].state_dict()}
    assert {name for name in names if not name.startswith("evaluation.")} == wanted


def test_under_an_adapter_only_the_adapter_is_saved(tmp_path, make_module):
    adapter = LoraConfig(r=2, target_modules=["q_proj"])
    names = torch.load(save(tmp_path, make_module(student_adapter=adapter), [KD()]))["state_dict"]
    saved = [name for name in names if not name.startswith("evaluation.")]
    assert saved
    assert all("lora_" in name for name in saved)


def test_random_bases_are_saved_whole(tmp_path, teacher_folder):
    student = {
        "model_type": "llama",
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    adapter = LoraConfig(r=2, target_modules=["q_proj"])
    module = DistillationModule(dict(student), str(teacher_folder), student_adapter=adapter)
    path = save(tmp_path, module, [KD()])
    torch.manual_seed(5)
    other = DistillationModule(
        dict(student),
        str(teacher_folder),
        student_adapter=LoraConfig(r=2, target_modules=["q_proj"]),
    )
    trainer = tiny.make_trainer(tmp_path)
    data = RolloutDataModule(val=tiny.make_rows(3), **SHORT)
    trainer.validate(other, data, ckpt_path=path, verbose=False)
    assert tiny.distance(tiny.weights(other), tiny.weights(module)) == 0


def resume(root, path, module, methods) -> None:
    trainer = tiny.make_trainer(root, methods, max_steps=2)
    data = RolloutDataModule(tiny.make_rows(4), batch_size=4, seed=7, **SHORT)
    trainer.fit(module, data, ckpt_path=path)


def test_another_methods_checkpoint_is_refused(tmp_path, make_module):
    path = save(tmp_path, make_module(), [KD()])
    with pytest.raises(CheckpointError, match=r"is of KD.*configured for SFT"):
        resume(tmp_path, path, make_module(), [SFT()])
    resume(tmp_path, path, make_module(), [KD()])


def test_responses_that_became_ids_by_other_rules_are_refused(tmp_path, make_module):
    """A run goes on with the rows it began with; on its own rollouts they do not matter."""
    for method, is_refused in ((KD(), True), (GKD(on_policy_fraction=1.0), False)):
        path = save(tmp_path / method.__class__.__name__, make_module(), [method])
        checkpoint = torch.load(path, weights_only=True)
        assert checkpoint["RolloutDataModule"].pop("text_rules") == RULES_VERSION
        torch.save(checkpoint, path)
        if is_refused:
            with pytest.raises(CheckpointError, match=r"by rules 1, this version has rules 2"):
                resume(tmp_path, path, make_module(), [method])
        else:
            resume(tmp_path, path, make_module(), [method])


def test_another_divisor_of_samples_is_refused(tmp_path, make_module):
    """Checkpoints from before there was a choice go on with token_mean, as the message says."""
    method = GKD(on_policy_fraction=1.0)
    path = save(tmp_path, make_module(), [method])
    with pytest.raises(CheckpointError, match=r"by running_mean, this run by constant"):
        resume(tmp_path, path, make_module(normalization="constant"), [method])
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["okd_lightning"].pop("normalization") == "running_mean"
    torch.save(checkpoint, path)
    with pytest.raises(CheckpointError, match=r"resume with --model.normalization token_mean"):
        resume(tmp_path, path, make_module(), [method])
    resume(tmp_path, path, make_module(normalization="token_mean"), [method])


OTHERS = {
    "wider": {"hidden_size": 64},
    "another architecture": None,
    "more layers": {"num_hidden_layers": 3},
    "fewer layers": {"num_hidden_layers": 1},
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_models_checkpoint_is_refused(name, tmp_path, make_module, tiny_tokenizer):
    path = save(tmp_path, make_module(), [KD()])
    fields = OTHERS[name]
    other = tiny.make_gpt2(1) if fields is None else tiny.make_llama(1, **fields)
    module = make_module(student=other, tokenizer=tiny_tokenizer)
    with pytest.raises(CheckpointError, match="belongs to another model"):
        resume(tmp_path, path, module, [KD()])
    with pytest.raises(CheckpointError, match="belongs to another model"):
        tiny.make_trainer(tmp_path).validate(
            make_module(student=other, tokenizer=tiny_tokenizer),
            RolloutDataModule(val=tiny.make_rows(3), **SHORT),
            ckpt_path=path,
            verbose=False,
        )


def test_a_foreign_checkpoint_is_refused(tmp_path, make_module):
    path = save(tmp_path, make_module(), [KD()])
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["okd_lightning"]
    torch.save(checkpoint, path)
    with pytest.raises(CheckpointError, match="not written by okd-lightning"):
        resume(tmp_path, path, make_module(), [KD()])


def test_two_methods_of_one_class_and_the_monitors_resume(tmp_path, make_module):
    def run(root, killer=None, ckpt_path=None):
        module, throughput = make_module(), Throughput()
        methods = [KD(name="a"), KD(name="b", temperature=2.0, weight=0.5)]
        callbacks = [
            *methods,
            throughput,
            RolloutLog(),
            ExactMatch(),
            LastCheckpoint(every_n_steps=1),
            *([killer] if killer else []),
        ]
        recorder = tiny.Recorder()
        trainer = tiny.make_trainer(root, [*callbacks, recorder])
        data = RolloutDataModule(
            tiny.make_rows(12), tiny.make_rows(3), batch_size=4, seed=7, **SHORT
        )
        with contextlib.suppress(Killed):
            trainer.fit(module, data, ckpt_path=ckpt_path)
        return module, throughput, recorder

    module, throughput, recorder = run(tmp_path / "a")
    assert {"train/a", "train/b", "train/loss"} <= set(recorder.losses[0])
    losses = recorder.losses[0]
    assert losses["train/loss"] == pytest.approx(
        losses["train/a"] + 0.5 * losses["train/b"], rel=1e-5
    )
    run(tmp_path / "b", Killer("on_train_batch_start", 3))
    last = str(tmp_path / "b" / "checkpoints" / "last.ckpt")
    resumed, counters, _ = run(tmp_path / "b", ckpt_path=last)
    assert tiny.distance(tiny.weights(resumed), tiny.weights(module)) == 0
    assert counters.tokens == throughput.tokens > 0


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
