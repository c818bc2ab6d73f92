"""Checkpoints and killed runs.

Frozen here: a run that was killed at any moment and resumed from its last checkpoint ends with the
weights, optimizer state and losses of the run that was not, bit for bit, with dropout,
accumulation, several optimizer steps per rollout batch and GKD's random choice, also where it is
killed twice or next to a validation. (What a checkpoint holds, and whose is refused:
test_saved_state.py.)
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections import Counter
from collections.abc import Collection
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
from lightning.pytorch.callbacks import Callback

from okd_lightning.callbacks import GKD, KD, ExactMatch, LastCheckpoint, RolloutLog, Throughput
from okd_lightning.data import RolloutDataModule
from okd_lightning.training.module import DistillationModule

SHORT = {"max_response_length": 8, "val_rollouts": 0}


class Killed(Exception):
    """Exception that ends a run in the middle."""


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
    """Record every logged loss by (epoch, batch), to compare a resumed run with another."""

    def __init__(self) -> None:
        self.seen: dict[tuple[int, int], float] = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen[trainer.current_epoch, batch_idx] = float(outputs["loss"])


class Snapshots(Callback):
    """Callback that copies the run's folder at calls of hooks, as a kill there would leave it.

    ``found`` maps (hook, number of the call) to the folder, or None before the first checkpoint,
    and to the losses until then.
    """

    def __init__(self, out: Path, moments: Collection[tuple[str, int]], losses: Losses) -> None:
        self.out, self.moments, self.losses = out, moments, losses
        self.calls: Counter[str] = Counter()
        self.found: dict[tuple[str, int], tuple[Path | None, dict]] = {}
        for hook in {hook for hook, _ in moments}:
            setattr(self, hook, partial(self.count, hook))

    def count(self, hook: str, trainer, *args, **kwargs) -> None:
        if trainer.sanity_checking:
            return
        self.calls[hook] += 1
        moment = hook, self.calls[hook]
        if moment in self.moments:
            self.found[moment] = self.copy(Path(trainer.default_root_dir)), dict(self.losses.seen)

    def copy(self, folder: Path) -> Path | None:
        """Return one copy for each state of the checkpoint."""
        last = folder / "checkpoints" / "last.ckpt"
        if not last.exists():
            return None
        copy = self.out / hashlib.sha256(last.read_bytes()).hexdigest()
        if not copy.exists():
            shutil.copytree(folder, copy)
        return copy


def train(
    root, folders, killer=None, ckpt_path=None, every_n_steps=1, val=None, moments=(), **settings
):
    """Train two epochs of 5 optimizer steps of 2 micro-batches; the last step is short.

    Returns:
        The module, its Trainer, the losses, and the snapshots at the moments.
    """
    student, teacher = folders
    torch.manual_seed(11)
    module = DistillationModule(
        str(student), str(teacher), learning_rate=3e-3, warmup_steps=3, schedule="cosine"
    )
    losses = Losses()
    snapshots = Snapshots(root.with_name(f"{root.name} snapshots"), moments, losses)
    callbacks = [
        GKD(0.5, on_policy_fraction=0.5),
        LastCheckpoint(every_n_steps=every_n_steps),
        losses,
        snapshots,
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
    assert killer or snapshots.found.keys() == set(moments)
    return module, trainer, losses.seen, snapshots.found


@pytest.fixture(scope="module")
def folders(dropout_folder, teacher_folder):
    return dropout_folder, teacher_folder


@pytest.fixture(scope="module")
def resumed(folders):
    """Runs that go on from a snapshot, each made once: equal files are the same start."""
    made = {}

    def resume(folder: Path, **settings):
        key = folder, repr(sorted(settings.items()))
        if key not in made:
            torch.manual_seed(99)  # whatever the new process did before
            here = folder.with_name(f"{folder.name} {len(made)}")
            shutil.copytree(folder, here)
            last = str(here / "checkpoints" / "last.ckpt")
            made[key] = train(here, folders, ckpt_path=last, **settings)
        return made[key]

    return resume


@pytest.fixture(scope="module")
def whole(folders, tmp_path_factory):
    """The run that nothing disturbs, and what a run killed at any moment leaves."""
    return train(tmp_path_factory.mktemp("whole"), folders, moments={*MOMENTS, *TWICE})


@pytest.fixture(scope="module")
def truth(whole):
    module, trainer, losses, _ = whole
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
TWICE = [
    ("on_train_batch_start", 4),
    ("on_train_batch_end", 10),  # the end of an epoch
    ("on_train_epoch_end", 1),
    ("on_train_epoch_start", 2),
    ("on_train_batch_start", 12),  # within the second epoch
]
AGAIN = [("on_train_batch_start", 3), ("on_train_epoch_end", 1)]


@pytest.mark.parametrize(("hook", "number"), MOMENTS)
def test_a_killed_run_ends_like_the_other(hook, number, whole, truth, resumed):
    folder, _ = whole[3][hook, number]
    if folder is None:
        assert (hook, number) in (("on_train_batch_start", 2), ("on_train_batch_end", 2))
        return
    last = folder / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] >= 1
    module, trainer, losses, _ = resumed(folder)
    if trainer.global_step == 10 and not losses:
        assert (hook, number) in (("on_train_epoch_end", 2), ("on_train_batch_end", 20))
        losses = truth[2]
    check_identical((module, trainer), truth, losses)


@pytest.mark.parametrize("first", TWICE, ids=str)
@pytest.mark.parametrize("second", AGAIN, ids=str)
def test_a_run_that_is_killed_twice_trains_its_epochs(first, second, whole, truth, resumed):
    """Lightning counts an epoch that a resumed run begins in one of its two counters alone."""
    folder, until_first = whole[3][first]
    found = resumed(folder, moments=tuple(AGAIN))
    check_identical(found[:2], truth, found[2])
    folder, until_second = found[3][second]
    module, trainer, losses, _ = resumed(folder)
    check_identical((module, trainer), truth, losses or truth[2])
    assert until_first | until_second | losses == truth[2]


EPOCH_STARTS = [("on_train_batch_start", number) for number in (11, 12, 15)]


@pytest.fixture(scope="module")
def saved_at_epochs(folders, tmp_path_factory):
    root = tmp_path_factory.mktemp("epochs")
    return train(root, folders, every_n_steps=None, moments=EPOCH_STARTS)[3]


@pytest.mark.parametrize("moment", EPOCH_STARTS)
def test_a_run_whose_last_checkpoint_is_an_epochs_end(moment, saved_at_epochs, truth, resumed):
    """Lightning gives a loader its state back only in the middle of an epoch."""
    module, trainer, losses, _ = resumed(saved_at_epochs[moment][0], every_n_steps=None)
    assert len(losses) == 10
    check_identical((module, trainer), truth, losses)


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
    """Kills come also right after a resume, where a new checkpoint must not be within a step."""
    last = tmp_path / "checkpoints" / "last.ckpt"
    train(tmp_path, folders, Killer("on_train_batch_start", 8), every_n_steps=every_n_steps)
    for number in (2, 2, 3, 8):
        killer = Killer("on_train_batch_start", number)
        train(tmp_path, folders, killer, str(last), every_n_steps)
    module, trainer, losses, _ = train(tmp_path, folders, None, str(last), every_n_steps)
    check_identical((module, trainer), truth, losses)


VALIDATED = [
    ("on_validation_start", 1),
    ("on_validation_end", 1),
    ("on_train_batch_start", 9),
    ("on_validation_end", 2),
    ("on_train_epoch_end", 1),
    ("on_train_batch_start", 11),
    ("on_train_batch_start", 13),
]


@pytest.fixture(scope="module", params=[None, 2])
def every(request):
    return request.param


@pytest.fixture(scope="module", params=[1.0, 4], ids=["every epoch", "in the middle"])
def interval(request):
    return request.param


@pytest.fixture(scope="module")
def validated(every, interval, folders, tmp_path_factory):
    """The settings of a run that validates, and what it leaves where it is killed."""
    settings = {"val": tiny.make_rows(4, seed=1), "val_check_interval": interval}
    root = tmp_path_factory.mktemp("validated")
    run = train(root, folders, every_n_steps=every, moments=VALIDATED, **settings)
    return settings, run[3]


@pytest.mark.parametrize("moment", VALIDATED)
def test_validation_does_not_disturb_a_resume(moment, interval, every, validated, truth, resumed):
    settings, found = validated
    folder, _ = found[moment]
    if folder is None:
        assert every is None or interval == 4  # none is written before a validation that is due
        assert moment in VALIDATED[:3]
        return
    module, trainer, losses, _ = resumed(folder, **settings)
    assert losses or moment == ("on_validation_end", 2)
    check_identical((module, trainer), truth, losses or truth[2])


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
