"""Frozen here: a checkpoint is all that validate, test, predict and a resume need.

* a resumed run ends with the weights of the uninterrupted one, bit for bit, and with its rows of
  metrics.csv and rollouts.jsonl, whether it continues in its own folder or was killed long after
  the checkpoint;
* typed options override the checkpoint's config;
* last.ckpt holds the state of "best".
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cli_workbench import QUIET, Assets, Result, assert_same_weights, read_metrics
from forked import type_command
from lightning import Trainer

Fit = Callable[..., Result]
RUN = Path("run")
LAST = RUN / "checkpoints" / "last.ckpt"

METHODS = {
    "KD": ["--method", "KD", "--method.temperature", "2"],
    "GKD": ["--method", "GKD", "--method.on_policy_fraction", "0.5"],
    "OKD": [
        *("--method", "OKD", "--method.online_module", "LoraConfig"),
        *("--method.online_module.r", "4", "--method.learning_rate", "0.01"),
    ],
    "OnPolicy": [
        *("--method", "GKD", "--method.on_policy_fraction", "1"),
        *("--data.prompts_per_rollout", "8"),
    ],
    "LoRA": [
        *("--method", "GKD", "--model.student_adapter", "LoraConfig"),
        *("--model.student_adapter.r", "4", "--model.student_adapter.lora_dropout", "0.3"),
    ],
}
FAST = ["--model.learning_rate", "1e-2"]
SCHEDULE = ["--model.schedule", "cosine", "--model.warmup_steps", "2"]
ACCUMULATED = ["--data.batch_size", "1", "--data.global_batch_size", "2"]
LONG = [*FAST, *ACCUMULATED, "--trainer.max_epochs", "2"]
TRAINING = [
    *LONG,
    *SCHEDULE,
    *("--trainer.callbacks+=RolloutLog", "--trainer.callbacks.every_n_steps", "3"),
    *("--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.filename", "at-{step}"),
    *("--trainer.callbacks.dirpath", "kept", "--trainer.callbacks.every_n_train_steps", "1"),
    *("--trainer.callbacks.save_top_k", "-1"),
]


def read_rollouts(folder: Path) -> str | None:
    path = folder / "rollouts.jsonl"
    return path.read_text() if path.exists() else None


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_is_the_uninterrupted_one(fit: Fit, okd: Fit, method: str) -> None:
    """The run is resumed in its own folder, which also holds rows from after the checkpoint."""
    fit(*METHODS[method], *TRAINING)
    whole = Path("whole")
    shutil.copytree(RUN, whole)
    for step in (4, 6):  # within an epoch, and at its end
        result = okd("fit", "--ckpt_path", f"kept/at-step={step}.ckpt")
        assert result.status == 0, result.err
        assert torch.load(LAST, weights_only=True)["global_step"] == 12
        assert_same_weights(LAST, whole / "checkpoints" / "last.ckpt")
        assert read_metrics(RUN / "metrics.csv") == read_metrics(whole / "metrics.csv")
        assert read_rollouts(RUN) == read_rollouts(whole)


@pytest.mark.parametrize("interval", ["4", "3"], ids=["mid-epoch", "epoch's end too"])
def test_resume_from_a_validations_checkpoint(fit: Fit, okd: Fit, interval: str) -> None:
    """Validation is neither forgotten nor repeated."""
    options = [*METHODS["GKD"], *LONG, "--trainer.val_check_interval", interval]
    fit(*options)
    shutil.copytree(RUN, "whole")
    fit(*options, "--trainer.max_steps", str(2 * int(interval)))
    result = okd(
        *("fit", "--ckpt_path", str(LAST), "--trainer.max_epochs", "2", "--trainer.max_steps", "-1")
    )
    assert result.status == 0, result.err
    assert_same_weights(LAST, Path("whole/checkpoints/last.ckpt"))
    steps = [int(r["step"]) for r in read_metrics(RUN / "metrics.csv") if "val/jsd" in r]
    assert steps == [int(interval) * i - 1 for i in range(1, 12 // int(interval) + 1)]


def test_a_longer_run_from_the_last_checkpoint(fit: Fit, okd: Fit) -> None:
    fit(*METHODS["KD"], *FAST, "--trainer.max_epochs", "3")
    shutil.copytree(RUN, "whole")
    fit(*METHODS["KD"], *FAST, "--trainer.max_epochs", "1")
    result = okd("fit", "--ckpt_path", str(LAST), "--trainer.max_epochs", "3")
    assert result.status == 0, result.err
    first = yaml.safe_load(Path("whole/config.yaml").read_text())
    assert yaml.safe_load((RUN / "config.yaml").read_text()) == first


KILLER = """
import os
from lightning.pytorch.callbacks import Callback


class Killer(Callback):
    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == 9:
            os.kill(os.getpid(), 9)
"""


def test_a_killed_run_loses_nothing_before_its_checkpoint(
    fit: Fit, okd: Fit, assets: Assets, here: Path
) -> None:
    """SIGKILL at step 9: last.ckpt is of step 6, and rows logged after it are removed."""
    options = [*METHODS["GKD"], *FAST, "--trainer.max_epochs", "2"]
    fit(*options)
    shutil.move(RUN, "whole")
    (here / "cli_killer.py").write_text(KILLER)
    command = ["fit", *assets.models, *assets.data, *QUIET]
    command += ["--trainer.default_root_dir", "run", *options]
    command += ["--trainer.callbacks+=cli_killer.Killer"]
    killed = type_command(command, here)
    assert killed.returncode == -9, killed.stderr
    with (RUN / "metrics.csv").open("a") as file:
        file.write("1,2")  # and half a line was written
    result = okd("fit", "--ckpt_path", str(LAST), "--config", "whole/config.yaml")
    assert result.status == 0, result.err
    assert_same_weights(LAST, Path("whole/checkpoints/last.ckpt"))
    assert read_metrics(RUN / "metrics.csv") == read_metrics(Path("whole/metrics.csv"))


def test_rollouts_with_odd_line_breaks_survive_a_resume(fit: Fit, okd: Fit) -> None:
    fit(*METHODS["OnPolicy"])
    with (RUN / "rollouts.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": 1, "response": "a\u2028b\x85c"}, ensure_ascii=False) + "\n")
    before = (RUN / "rollouts.jsonl").read_bytes()
    assert okd("fit", "--ckpt_path", str(LAST)).status == 0
    assert (RUN / "rollouts.jsonl").read_bytes() == before


def test_no_checkpoint_falls_between_micro_batches(
    fit: Fit, okd: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a step's gradient is in no checkpoint; neither at the start nor after a resume."""
    saved = []

    def save(trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        saved.append(trainer.fit_loop.epoch_loop.batch_progress.current.ready)
        original(trainer, *args, **kwargs)

    original = Trainer.save_checkpoint
    monkeypatch.setattr(Trainer, "save_checkpoint", save)
    fit(
        *(*METHODS["KD"], *LONG, "--trainer.max_steps", "4"),
        *("--trainer.callbacks+=LastCheckpoint", "--trainer.callbacks.every_n_steps", "2"),
    )
    assert okd("fit", "--ckpt_path", str(LAST), "--trainer.max_steps", "6").status == 0
    assert len(saved) >= 3
    assert not any(ready % 2 for ready in saved), saved


def test_the_last_checkpoint_knows_the_best(fit: Fit) -> None:
    fit(*METHODS["KD"], *FAST, "--trainer.val_check_interval", "2")
    (best,) = (RUN / "checkpoints").glob("best-*.ckpt")
    state = torch.load(LAST, weights_only=True)["callbacks"]["BestCheckpoint"]
    measured = [
        float(row["val/reverse_kl"])
        for row in read_metrics(RUN / "metrics.csv")
        if "val/reverse_kl" in row
    ]
    assert float(state["best_model_score"]) == pytest.approx(min(measured))
    assert Path(state["best_model_path"]).name == best.name


def test_measuring_needs_the_checkpoint_alone(fit: Fit, okd: Fit) -> None:
    fit(*METHODS["GKD"])
    (row,) = [r for r in read_metrics(RUN / "metrics.csv") if "val/reverse_kl" in r]
    validated = okd("validate", "--ckpt_path", str(LAST))
    numbers = dict(line.split() for line in validated.out.strip().splitlines())
    assert validated.status == 0
    for name, value in numbers.items():
        assert float(value) == pytest.approx(float(row[name]), rel=1e-4), name
    tested = okd("test", "--ckpt_path", str(LAST))
    again = dict(line.split() for line in tested.out.strip().splitlines())
    assert {name.replace("test/", "val/"): v for name, v in again.items()} == numbers
    rows = [r for r in read_metrics(RUN / "metrics.csv") if {"val/jsd", "test/jsd"} & r.keys()]
    assert [r["step"] for r in rows] == [row["step"]] * 3  # that of the weights


def test_flags_win_over_the_checkpoints_config(fit: Fit, okd: Fit, assets: Assets) -> None:
    fit(*METHODS["KD"])
    result = okd("test", "--ckpt_path", str(LAST), "--data.test", assets.train)
    assert "test: 12 rows" in result.log
    Path("overlay.yaml").write_text("data: {val_rollouts: 0}\n")
    result = okd("test", "--ckpt_path", str(LAST), "--config", "overlay.yaml")
    assert "on_policy" not in result.out


def test_predict_writes_an_answer_for_every_prompt(fit: Fit, okd: Fit, assets: Assets) -> None:
    fit(*METHODS["KD"])
    result = okd("predict", "--ckpt_path", str(LAST), "--data.sampling.temperature", "0")
    assert "4 answers written to run/predictions.jsonl" in result.log
    lines = (RUN / "predictions.jsonl").read_text().split("\n")[:-1]
    records = [json.loads(line) for line in lines]
    given = [json.loads(line)["prompt"] for line in Path(assets.val).read_text().splitlines()]
    assert [record["prompt"] for record in records] == given
    assert all(record["stop_reason"] in ("eos", "length") for record in records)
    assert okd("predict", "--ckpt_path", str(LAST), "--data.predict", assets.train).status == 0
    assert len((RUN / "predictions.jsonl").read_text().split("\n")[:-1]) == 12


def test_resuming_leaves_a_failed_attempt_no_trace(fit: Fit, okd: Fit) -> None:
    """Another method is refused, and neither config.yaml nor a row of metrics.csv has changed."""
    fit(*METHODS["KD"], *TRAINING)
    before = {p: p.read_bytes() for p in RUN.iterdir() if p.is_file()}
    with pytest.warns(UserWarning, match="dropped"):
        result = okd("fit", "--ckpt_path", "kept/at-step=4.ckpt", "--method", "SFT")
    assert result.status == 1
    assert {p: p.read_bytes() for p in RUN.iterdir() if p.is_file()} == before


def test_a_config_of_an_earlier_version_names_classes_where_they_were(fit: Fit, okd: Fit) -> None:
    reward = "Reward", "--method.function", "okd_lightning.rewards.AnswerMatch"
    fit("--method", *reward, "--method.baseline", "none", "--trainer.max_steps", "1")
    checkpoint = torch.load(LAST, weights_only=True)
    config = checkpoint["okd_lightning"]["config"]
    assert "okd_lightning.rewards.AnswerMatch" in config
    checkpoint["okd_lightning"]["config"] = config.replace("rewards.Ans", "advantages.Ans")
    torch.save(checkpoint, LAST)
    result = okd("fit", "--ckpt_path", str(LAST), "--trainer.max_steps", "2")
    assert result.status == 0, result.err
