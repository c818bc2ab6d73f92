"""Frozen here: options of ``okd-lightning fit``, and its files in the run's folder.

* every method and every way to compose methods runs from the command line alone;
* a run's folder holds config.yaml, metrics.csv, the best and the last checkpoint, TensorBoard,
  and rollouts.jsonl;
* a second run in the same folder moves all files of the first one away;
* a user's own classes are found in the current folder, after everything installed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from cli_workbench import (
    LENGTHS,
    QUIET,
    STUDENT_FIELDS,
    Assets,
    Result,
    metric_names,
    read_checkpoint_weights,
    read_metrics,
    write_jsonl,
)

Fit = Callable[..., Result]
RUN = Path("run")
LAST = RUN / "checkpoints" / "last.ckpt"
STUDENT_CONFIG = json.dumps({"model_type": "llama", **STUDENT_FIELDS})

TEACHER_MEASURES = {"val/forward_kl", "val/reverse_kl", "val/jsd", "val/agreement"}
OWN_MEASURES = {"val/on_policy_reverse_kl", "val/on_policy_forward_kl", "val/on_policy_entropy"}


def test_sft_needs_no_teacher(fit: Fit, assets: Assets) -> None:
    fit("--method", "SFT", "--model.student", assets.student, models=False)
    names = metric_names(RUN / "metrics.csv")
    assert {"train/loss", "train/sft", "val/cross_entropy", "val/on_policy_entropy"} <= names
    assert not names & TEACHER_MEASURES


def test_kd_leaves_a_whole_run_folder(fit: Fit) -> None:
    result = fit("--method", "KD")
    found = {path.name for path in RUN.iterdir()}
    files = {"config.yaml", "metrics.csv", "rollouts.jsonl", "checkpoints", "tensorboard"}
    assert found == files
    checkpoints = {path.name for path in (RUN / "checkpoints").iterdir()}
    assert checkpoints == {"last.ckpt", "best-step=6.ckpt"}
    assert any((RUN / "tensorboard").glob("events*"))
    expected = {"train/loss", "train/kd", "train/grad_norm", "train/tokens", "val/cross_entropy"}
    expected |= TEACHER_MEASURES | OWN_MEASURES
    assert expected <= metric_names(RUN / "metrics.csv")
    assert "best-step=6.ckpt" in result.log
    assert "12 rows" in result.log
    assert "6 optimizer steps of 2 rows" in result.log


OTHER = ["--trainer.logger+=TensorBoardLogger", "--trainer.logger.save_dir", "other"]


@pytest.mark.parametrize(
    ("flags", "files"),
    [
        (["--trainer.logger", "TensorBoardLogger", "--trainer.logger.save_dir", "other"], True),
        ([*OTHER, "--trainer.logger+=CSVLogger", "--trainer.logger.save_dir", "more"], True),
        (["--trainer.logger", "false"], False),
    ],
)
def test_other_loggers_are_next_to_the_table(fit: Fit, flags: list[str], files: bool) -> None:
    fit("--method", "KD", "--trainer.max_steps", "2", flags)
    assert (RUN / "metrics.csv").is_file() == files
    assert any(Path("other").glob("**/events*")) == files
    assert any(Path("more").glob("**/metrics.csv")) == ("more" in flags)
    assert not (RUN / "tensorboard").exists()


def test_kd_learns(fit: Fit) -> None:
    fit("--method", "KD", "--model.learning_rate", "1e-2", "--trainer.max_epochs", "4")
    measured = [float(r["val/reverse_kl"]) for r in read_metrics(RUN / "metrics.csv") if len(r) > 8]
    assert measured[-1] < 0.7 * measured[0]


@pytest.mark.parametrize("share", ["0", ".5", "1"])
def test_gkd_mixes_by_its_share(fit: Fit, share: str) -> None:
    fit("--method", "GKD", "--method.on_policy_fraction", share)
    rollouts = RUN / "rollouts.jsonl"
    written = "rollout/tokens" in metric_names(RUN / "metrics.csv")
    records = [json.loads(line) for line in rollouts.read_text().splitlines()]
    assert ("rollout" in {r["kind"] for r in records}) == written == (share != "0")
    if share == "1":
        first = records[0]
        names = {"step", "kind", "source", "index", "prompt", "response", "text", "num_tokens"}
        assert first.keys() == names
        assert first["source"] == "student"
        assert first["prompt"].endswith("=")


def test_a_divergence_with_settings_changes_the_loss(fit: Fit) -> None:
    base = ["--method", "DivergenceCallback", "--method.divergence", "JensenShannon"]
    losses = []
    for beta in ("0.3", "0.7"):
        fit(*base, "--method.divergence.beta", beta, "--trainer.max_steps", "1")
        losses.append(float(read_metrics(RUN / "metrics.csv")[0]["train/loss"]))
        config = yaml.safe_load((RUN / "config.yaml").read_text())
        assert config["method"]["init_args"]["divergence"]["init_args"]["beta"] == float(beta)
    assert losses[0] != losses[1]


def test_two_methods_add_up(fit: Fit) -> None:
    fit(
        *("--method", "KD", "--method.weight", "2"),
        *("--trainer.callbacks+=SFT", "--trainer.callbacks.weight", "0.5"),
    )
    row = {k: float(v) for k, v in read_metrics(RUN / "metrics.csv")[0].items()}
    assert row["train/loss"] == pytest.approx(2 * row["train/kd"] + 0.5 * row["train/sft"])


def test_kd_on_the_data_next_to_gkd_on_rollouts(fit: Fit) -> None:
    fit("--method", "KD", "--trainer.callbacks+=GKD", "--trainer.callbacks.on_policy_fraction", "1")
    assert {"train/kd", "train/gkd", "rollout/tokens"} <= metric_names(RUN / "metrics.csv")


def test_two_methods_of_one_class_with_names(fit: Fit) -> None:
    fit(
        *("--method", "KD", "--method.name", "cold"),
        *("--trainer.callbacks+=KD", "--trainer.callbacks.name", "warm"),
        *("--trainer.callbacks.temperature", "3"),
    )
    assert {"train/cold", "train/warm"} <= metric_names(RUN / "metrics.csv")


def test_a_method_in_the_trainers_callbacks_alone(fit: Fit) -> None:
    fit("--trainer.callbacks+=KD")
    assert "train/kd" in metric_names(RUN / "metrics.csv")


@pytest.mark.parametrize("is_method", [True, False])
def test_two_methods_of_one_class_get_names_as_the_message_says(
    okd: Callable[..., Result], assets: Assets, is_method: bool
) -> None:
    base = [*assets.models, *assets.data, *QUIET, "--trainer.default_root_dir", "run"]
    base += ["--method", "KD"] if is_method else ["--trainer.callbacks+=KD"]
    other = ["--trainer.callbacks+=KD"]
    refused = okd("fit", base, other)
    assert refused.status == 1
    wanted = "--method.name NAME" if is_method else "--trainer.callbacks.name NAME"
    assert wanted in refused.err
    option = wanted.split()[0]
    words = [*base, option, "second", *other] if is_method else [*base, *other, option, "second"]
    result = okd("fit", words, "--trainer.max_steps", "1")
    assert result.status == 0, result.err
    assert {"train/kd", "train/second"} <= metric_names(RUN / "metrics.csv")


def test_monitors_compose_with_methods(fit: Fit) -> None:
    fit(
        *("--method", "GKD", "--method.on_policy_fraction", "1"),
        *("--trainer.callbacks+=ExactMatch", "--trainer.callbacks.num_prompts", "2"),
        *("--trainer.callbacks+=LastCheckpoint", "--trainer.callbacks.every_n_steps", "4"),
        *("--trainer.callbacks+=RolloutLog", "--trainer.callbacks.every_n_steps", "2"),
        "--trainer.callbacks+=LearningRateMonitor",
    )
    records = map(json.loads, (RUN / "rollouts.jsonl").read_text().splitlines())
    assert sorted({r["step"] for r in records if r["kind"] == "rollout"}) == [0, 2, 4]
    assert {"val/exact_match"} <= metric_names(RUN / "metrics.csv")


MY_METHOD = """
from okd_lightning.callbacks import DivergenceCallback
from okd_lightning.divergences import ForwardKL


class MyKL(ForwardKL):
    '''Mine.'''


class MyMethod(DivergenceCallback):
    def __init__(self, sharpness: float = 2.0) -> None:
        super().__init__(divergence=MyKL(), temperature=1 / sharpness)
"""


def test_own_method_and_divergence_from_the_current_folder(fit: Fit, here: Path) -> None:
    (here / "cli_plugins").mkdir()
    (here / "cli_plugins" / "mine.py").write_text(MY_METHOD)
    fit("--method", "cli_plugins.mine.MyMethod", "--method.sharpness", "0.5")
    assert "train/my_method" in metric_names(RUN / "metrics.csv")
    fit("--method", "KD", "--method.divergence", "cli_plugins.mine.MyKL")
    own = read_metrics(RUN / "metrics.csv")[0]["train/kd"]
    fit("--method", "KD")
    assert read_metrics(RUN / "metrics.csv")[0]["train/kd"] == own


def test_the_current_folder_hides_nothing_installed(fit: Fit, here: Path) -> None:
    (here / "yaml.py").write_text("raise RuntimeError('the wrong yaml')")
    (here / "peft.py").write_text("raise RuntimeError('the wrong peft')")
    fit("--method", "KD", "--trainer.max_steps", "1")


def test_a_student_from_random_weights(fit: Fit, assets: Assets) -> None:
    fit(
        *("--method", "KD", "--model.student", STUDENT_CONFIG, "--model.tokenizer"),
        *(assets.tokenizer, "--model.teacher", assets.teacher),
        models=False,
    )
    assert read_checkpoint_weights(LAST)["student.lm_head.weight"].shape == (258, 32)


def test_the_teachers_tokenizer_serves_a_student_without_one(fit: Fit, assets: Assets) -> None:
    fit("--method", "KD", *assets.models, "--model.student", STUDENT_CONFIG, models=False)


def test_lora_trains_the_adapter_alone(fit: Fit) -> None:
    fit(
        *("--method", "KD", "--model.student_adapter", "LoraConfig"),
        *("--model.student_adapter.r", "4", "--model.student_adapter.lora_alpha", "8"),
    )
    weights = read_checkpoint_weights(LAST)
    assert weights
    assert all("lora_" in name for name in weights)
    assert any(value.abs().sum() > 0 for name, value in weights.items() if "lora_B" in name)


def test_number_formats_and_recomputing_change_little(fit: Fit) -> None:
    losses = []
    for options in (
        (),
        ("--model.gradient_checkpointing", "true"),
        ("--model.teacher_dtype", "bfloat16"),
        ("--trainer.precision", "bf16-mixed"),
    ):
        fit("--method", "KD", "--trainer.max_steps", "3", *options)
        losses.append([float(r["train/loss"]) for r in read_metrics(RUN / "metrics.csv")[:3]])
    plain, recomputed, bf16_teacher, mixed = map(torch.tensor, losses)
    torch.testing.assert_close(plain, recomputed)
    torch.testing.assert_close(plain, bf16_teacher, rtol=0.05, atol=0)
    torch.testing.assert_close(plain, mixed, rtol=0.1, atol=0)
    assert not torch.equal(plain, bf16_teacher)


def test_a_full_optimizer_overrides_the_learning_rate(fit: Fit) -> None:
    fit("--method", "KD", "--model.optimizer", "SGD", "--model.optimizer.lr", "1e-3")
    (state,) = torch.load(LAST, weights_only=True)["optimizer_states"]
    assert state["param_groups"][0]["initial_lr"] == 1e-3
    assert "momentum" in state["param_groups"][0]


def test_warm_up_and_schedule(fit: Fit) -> None:
    fit(
        *("--method", "KD", "--model.learning_rate", "1e-3", "--model.warmup_steps", "2"),
        *("--model.schedule", "linear", "--trainer.callbacks+=LearningRateMonitor"),
    )
    rows = read_metrics(RUN / "metrics.csv")
    column = "lr-AdamW/student/decay"
    rates = [float(row[column]) for row in rows if row.get(column)]
    assert rates == pytest.approx([0.0005, 0.001, 0.001, 0.00075, 0.0005, 0.00025])


def test_global_batch_size_sets_the_accumulation(fit: Fit) -> None:
    fit("--method", "KD", "--data.global_batch_size", "6")
    one = read_metrics(RUN / "metrics.csv")[0]["train/loss"]
    assert torch.load(LAST, weights_only=True)["global_step"] == 2
    fit("--method", "KD", "--data.batch_size", "6")
    assert float(read_metrics(RUN / "metrics.csv")[0]["train/loss"]) == pytest.approx(float(one))


def test_validation_intervals_count_optimizer_steps(fit: Fit) -> None:
    fit(
        *("--method", "KD", "--data.batch_size", "1", "--data.global_batch_size", "2"),
        *("--trainer.val_check_interval", "4", "--trainer.max_epochs", "2"),
    )
    rows = read_metrics(RUN / "metrics.csv")
    assert [int(row["step"]) + 1 for row in rows if "val/reverse_kl" in row] == [4, 8, 12]


def test_a_second_run_moves_the_first_away(fit: Fit) -> None:
    fit("--method", "GKD", "--method.on_policy_fraction", "1")
    first = {p.relative_to(RUN): p.read_bytes() for p in RUN.rglob("*") if p.is_file()}
    fit("--method", "KD")
    moved = RUN / "earlier" / "1"
    again = {p.relative_to(moved): p.read_bytes() for p in moved.rglob("*") if p.is_file()}
    assert again == first
    records = map(json.loads, (RUN / "rollouts.jsonl").read_text().splitlines())
    assert {record["kind"] for record in records} == {"sample"}  # nobody writes in KD
    result = fit("--method", "SFT")
    assert "earlier/2" in result.log
    assert (moved / "metrics.csv").exists()


def test_prompts_alone_are_enough_on_policy(okd: Fit, assets: Assets, here: Path) -> None:
    """Without dataset responses "best" follows the divergence on on-policy samples."""
    rows = [json.loads(line) for line in Path(assets.train).read_text().splitlines()]
    prompts = here / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows))
    result = okd(
        *("fit", assets.models, LENGTHS, QUIET, "--trainer.default_root_dir", "run"),
        *("--data.train", str(prompts), "--data.val", str(prompts), "--method", "GKD"),
        *("--method.on_policy_fraction", "1", "--data.samples_per_prompt", "2"),
    )
    assert result.status == 0, result.err
    assert (RUN / "checkpoints" / "best-step=12.ckpt").exists()


def test_fast_dev_run_leaves_nothing(fit: Fit) -> None:
    result = fit("--method", "GKD", "--trainer.fast_dev_run", "true")
    assert "nothing was logged or kept" in result.log
    assert not re.findall(r"\S+\.(?:ckpt|csv|yaml)\b", result.log + result.out + result.err)
    assert not (RUN / "checkpoints").exists()
    assert not (RUN / "metrics.csv").exists()


def test_the_same_seed_gives_the_same_numbers(fit: Fit) -> None:
    runs = []
    for seed in ("3", "3", "4"):
        fit("--method", "GKD", "--seed_everything", seed)
        runs.append(read_metrics(RUN / "metrics.csv"))
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_a_run_that_is_given_a_time_alone_continues_for_it(fit: Fit) -> None:
    fit("--method", "KD", "--trainer.max_time", "00:00:00:03", "--trainer.limit_val_batches", "0")
    assert int(read_metrics(RUN / "metrics.csv")[-1]["epoch"]) > 1


def test_a_default_that_is_an_enum_is_saved_as_text(fit: Fit) -> None:
    """Lightning's Timer has one, though its parameter is text."""
    fit("--method", "SFT", "--trainer.callbacks+=Timer", "--trainer.max_steps", "1")
    (timer,) = yaml.safe_load((RUN / "config.yaml").read_text())["trainer"]["callbacks"]
    assert timer["init_args"]["interval"] == "step"


def test_further_columns_of_the_rows_are_ignored(fit: Fit, here: Path) -> None:
    rows = [{"prompt": "abc", "response": "d", "answer": 3, "meta": {"a": []}}] * 4
    file = write_jsonl(here / "wide.jsonl", rows)
    fit("--method", "KD", "--data.train", str(file))
