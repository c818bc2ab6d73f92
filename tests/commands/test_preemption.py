"""Frozen here: a run that gets SIGTERM stops after a checkpoint, and resumes without a difference.

* wherever the signal comes (in a training step, during generation, in a validation, in
  the first rollout of an epoch), the run ends with status 143 and one line, and the same command
  (``--ckpt_path last``) ends with the weights, metrics.csv and rollouts.jsonl of the run that was
  left alone;
* the same holds for a run that is stopped twice: it trains the requested number of epochs;
* ``stopped.json`` holds the signal, the step, the checkpoint and a command that resumes;
* a command without a checkpoint to save (validate, test, diagnose) ends by the signal, at once;
* under SLURM its warning signal does the same and asks for the job to be put into the queue again.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import lightning
import pytest
import torch
from cli_workbench import QUIET, Assets, Result, assert_same_weights, read_metrics
from forked import type_command

from okd_lightning.__main__ import main
from okd_lightning.callbacks import KD, Preemption
from okd_lightning.data import RolloutDataModule
from okd_lightning.errors import PreemptedError
from okd_lightning.rollouts import RolloutLoader
from okd_lightning.rollouts.evaluation import StudentResponses
from okd_lightning.training.module import DistillationModule
from okd_lightning.training.pair import Pair

Fit = Callable[..., Result]
RUN = Path("run")
LAST = RUN / "checkpoints" / "last.ckpt"

PLACES = {
    "training": (DistillationModule, "training_step"),
    "rollout": (RolloutLoader, "_generate"),
    "validation": (DistillationModule, "validation_step"),
    "validation's rollout": (StudentResponses, "_generate"),
}


def options(assets: Assets, *more: str) -> list[str]:
    """Options of two epochs of 6 steps of 2 micro-batches; rollout batches of 2 steps."""
    return [
        *(*assets.data, *QUIET, *assets.models, "--trainer.default_root_dir", str(RUN)),
        *("--method", "GKD", "--method.on_policy_fraction", "0.5"),
        *("--data.batch_size", "1", "--data.global_batch_size", "2"),
        *("--data.prompts_per_rollout", "4", "--trainer.max_epochs", "2"),
        *("--model.learning_rate", "1e-2", "--model.schedule", "cosine"),
        *("--trainer.val_check_interval", "3", "--ckpt_path", "last"),
        *("--trainer.callbacks+=RolloutLog", "--trainer.callbacks.every_n_steps", "3"),
        *more,
    ]


def signal_at(
    monkeypatch: pytest.MonkeyPatch, place: str, number: int, which: int = signal.SIGTERM
) -> None:
    """Send this process a signal within the n-th call."""
    owner, name = PLACES[place]
    original, calls = getattr(owner, name), []

    def sent(*args, **kwargs):
        calls.append(name)
        if len(calls) == number:
            os.kill(os.getpid(), which)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, sent)


@pytest.fixture(scope="module")
def whole(assets: Assets, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs that were left alone, by name; filled as they are needed."""
    return {"": tmp_path_factory.mktemp("whole")}


def left_alone(okd: Fit, assets: Assets, whole: dict[str, Path], *more: str) -> Path:
    name = " ".join(more)
    if name not in whole:
        result = okd("fit", *options(assets, *more))
        assert result.status == 0, result.err
        whole[name] = whole[""] / str(len(whole))
        shutil.move(RUN, whole[name])
    return whole[name]


MOMENTS = [
    # a step's first and second batch: of a run's beginning, before a validation, of an epoch's end
    *(("training", n) for n in (1, 2, 6, 12, 13, 24)),
    *(("rollout", n) for n in (1, 4)),
    *(("validation", n) for n in (1, 16)),
    *(("validation's rollout", n) for n in (1, 4)),
]


@pytest.mark.parametrize(("place", "number"), MOMENTS)
def test_a_stopped_run_continues(
    place: str,
    number: int,
    okd: Fit,
    assets: Assets,
    whole: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    truth = left_alone(okd, assets, whole, "--trainer.enable_checkpointing", "true")
    with monkeypatch.context() as patched:
        signal_at(patched, place, number)
        stopped = okd("fit", *options(assets))
    lines = [line for line in stopped.err.splitlines() if line.startswith("okd-lightning: ")]
    is_saved = LAST.exists()
    step = torch.load(LAST, weights_only=True)["global_step"] if is_saved else 0
    if stopped.status == 0:  # nothing was left to be done but to end
        assert (place, number, step, lines) == ("training", 24, 12, [])
    else:
        assert stopped.status == 143, stopped.err
        (line,) = lines
        assert f"stopped by a signal at step {step}" in line
        assert ("; resume: " if is_saved else "before there was anything to save") in line
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    resumed = okd("fit", *options(assets))
    assert resumed.status == 0, resumed.err
    assert torch.load(LAST, weights_only=True)["global_step"] == 12
    assert_same_weights(LAST, truth / "checkpoints" / "last.ckpt")
    assert read_metrics(RUN / "metrics.csv") == read_metrics(truth / "metrics.csv")
    assert (RUN / "rollouts.jsonl").read_text() == (truth / "rollouts.jsonl").read_text()


def test_the_record_says_how_to_go_on(
    okd: Fit, assets: Assets, whole: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recorded command resumes the run; the record is removed when training continues."""
    truth = left_alone(okd, assets, whole, "--trainer.enable_checkpointing", "true")
    with monkeypatch.context() as patched:
        signal_at(patched, "training", 5)
        assert okd("fit", *options(assets)).status == 143
    record = json.loads((RUN / "stopped.json").read_text())
    resume = f"okd-lightning fit --ckpt_path {LAST}"
    assert record == {"signal": "SIGTERM", "step": 3, "checkpoint": str(LAST), "resume": resume}
    resumed = okd(*shlex.split(record["resume"])[1:])
    assert resumed.status == 0, resumed.err
    assert not (RUN / "stopped.json").exists()
    assert_same_weights(LAST, truth / "checkpoints" / "last.ckpt")


def test_the_record_of_a_run_without_checkpoints(
    okd: Fit, assets: Assets, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run from Python need not have checkpoints."""
    signal_at(monkeypatch, "training", 2)
    module = DistillationModule(assets.student, assets.teacher, learning_rate=1e-3)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=5,
        logger=False,
        enable_progress_bar=False,
        default_root_dir=RUN,
        callbacks=[KD(), Preemption()],
    )
    with pytest.raises(PreemptedError, match="no LastCheckpoint"):
        trainer.fit(module, RolloutDataModule(assets.train, batch_size=2, max_response_length=8))
    record = json.loads((RUN / "stopped.json").read_text())
    assert record == {"signal": "SIGTERM", "step": 2, "checkpoint": None, "resume": None}


DROPOUT = ("--model.student_adapter", "LoraConfig", "--model.student_adapter.lora_dropout", "0.3")
TWICE = [
    ((("training", 12), ("training", 4)), "3"),  # at an epoch's end, then within the next
    ((("rollout", 4), ("training", 2)), "3"),
    ((("validation", 1), ("rollout", 1)), "2"),  # in a validation, then before it begins again
    ((("validation", 1), ("rollout", 2)), "1"),  # in a validation, then just after it
]


@pytest.mark.parametrize(("places", "interval"), TWICE, ids=str)
def test_a_run_that_is_stopped_twice_ends_like_the_others(
    places: tuple[tuple[str, int], ...],
    interval: str,
    okd: Fit,
    assets: Assets,
    whole: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    more = ("--trainer.val_check_interval", interval, *DROPOUT)
    truth = left_alone(okd, assets, whole, *more)
    for place in places:
        with monkeypatch.context() as patched:
            signal_at(patched, *place)
            assert okd("fit", *options(assets, *more)).status == 143
    resumed = okd("fit", *options(assets, *more))
    assert resumed.status == 0, resumed.err
    assert torch.load(LAST, weights_only=True)["global_step"] == 12
    assert_same_weights(LAST, truth / "checkpoints" / "last.ckpt")
    assert read_metrics(RUN / "metrics.csv") == read_metrics(truth / "metrics.csv")


def test_slurms_warning_puts_the_job_back(
    okd: Fit, assets: Assets, monkeypatch: pytest.MonkeyPatch, here: Path
) -> None:
    """SLURM sends the signal before the time limit; SIGTERM alone requeues nothing."""
    (here / "bin").mkdir()
    (here / "bin" / "scontrol").write_text(f"#!/bin/sh\necho $@ >> {here}/asked\n")
    (here / "bin" / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{here / 'bin'}:{os.environ['PATH']}")
    job = {"JOB_ID": "77", "NTASKS": "1", "LOCALID": "0", "PROCID": "0", "NODEID": "0"}
    for name, value in {**job, "JOB_NAME": "train", "NTASKS_PER_NODE": "1"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    with monkeypatch.context() as patched:
        signal_at(patched, "training", 5, signal.SIGTERM)
        assert okd("fit", *options(assets)).status == 143
    assert not (here / "asked").exists()
    with monkeypatch.context() as patched:
        signal_at(patched, "training", 5, signal.SIGUSR1)
        stopped = okd("fit", *options(assets))
    assert stopped.status == 143, stopped.err
    assert (here / "asked").read_text() == "requeue 77\n"
    assert torch.load(LAST, weights_only=True)["global_step"] == 6


def interrupted() -> int | None:
    """Type a command in which SIGTERM comes while a forward pass runs in no training step."""
    original = Pair.sides

    def sides(*arguments: object) -> object:
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    Pair.sides = sides
    return main()


@pytest.mark.parametrize("command", ["validate", "test", "diagnose"])
def test_a_command_that_saves_no_checkpoint_ends_by_the_signal(
    command: str, assets: Assets, tmp_path: Path
) -> None:
    words = [command, *assets.data, *QUIET, *assets.models]
    words += ["--data.test", assets.val] if command == "test" else []
    ended = type_command(words, tmp_path, program=interrupted)
    assert ended.returncode == -signal.SIGTERM, ended.stderr
    assert "Traceback" not in ended.stderr


def test_the_handler_is_gone_after_the_command(okd: Fit, assets: Assets) -> None:
    result = okd("validate", assets.data, QUIET, assets.models)
    assert result.status == 0, result.err
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
