"""``okd-lightning compare`` in a shell.

* Every contender starts from the same student and ends with the same budget; the files hold every
  run with its seed, and the terminal the means.
* A killed comparison continues: finished runs are left alone, the unfinished one ends with the same
  numbers as without the kill; more contenders and seeds can be added.
* A run that fails is reported, the others are not lost, and the exit status says so; the same
  command tries it again.
* Budgets in tokens, seconds and CPU seconds end after the step that uses them up, with a
  measurement there; CPU seconds are refused where something else computes.
* A mistake is one line, before anything is trained.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from cli_workbench import QUIET, read_metrics, write_jsonl

from okd_lightning.commands.compare.budget import Budget
from okd_lightning.commands.compare.entries import read_entries
from okd_lightning.teachers import ForeignTeacher, LoadedTeacher, RoutedTeachers, ServedTeacher

ENGINE = ["--model.engine", "VLLMServer", "--model.engine.url", "http://127.0.0.1:9"]
ENGINE += ["--model.engine.sync_folder", "weights"]
OWN = """
from pathlib import Path
from lightning.pytorch.callbacks import Callback
from okd_lightning.callbacks import KD

class Interrupted(Callback):
    def on_train_batch_end(self, trainer, *rest):
        if trainer.global_step == 3 and Path("interrupt").read_text() in trainer.default_root_dir:
            raise KeyboardInterrupt

class Fragile(KD):
    def loss(self, measured):
        if Path("broken").exists():
            raise ArithmeticError("this method is broken")
        return super().loss(measured)
"""


@pytest.fixture
def compare(okd, assets, here, monkeypatch):
    """``compare`` on the tiny pair into ``out/``; own callbacks are in ``own_callbacks``."""
    (here / "own_callbacks.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(here))

    def type_compare(*argv, data=None):
        base = [*assets.models, *(data or assets.data), *QUIET, "--trainer.val_check_interval", "2"]
        return okd("compare", base, "--out", "out", *argv)

    return type_compare


def results(folder: Path = Path("out")):
    return json.loads((folder / "results.json").read_text())


def untimed(record):
    return {name: value for name, value in record.items() if "seconds" not in name}


def curves(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return [untimed(row) for row in csv.DictReader(file)]


def test_two_methods_and_two_seeds(compare):
    said = compare("--methods", "KD,GKD", "--seeds", "0,1", "--budget", "steps=4")
    assert said.status == 0, said.err
    runs = results()
    assert [(run["method"], run["seed"]) for run in runs] == [
        ("KD", 0),
        ("GKD", 0),
        ("KD", 1),
        ("GKD", 1),
    ]
    assert {run["steps"] for run in runs} == {4}
    assert runs[0]["before"] == runs[1]["before"]
    assert runs[0]["after"] != runs[1]["after"]
    assert runs[0]["generated_tokens"] == 0 < runs[1]["generated_tokens"]
    assert all(run["seconds"] > 0 and run["cpu_seconds"] > 0 for run in runs)
    with Path("out/metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows[:3]] == ["0", "2", "4"]
    assert float(rows[2]["val/reverse_kl"]) == runs[0]["after"]["val/reverse_kl"]
    with Path("out/results.csv").open(newline="") as file:
        first = next(csv.DictReader(file))
    assert float(first["after val/agreement"]) == runs[0]["after"]["val/agreement"]
    assert Path("out/comparison.png").read_bytes()[:4] == b"\x89PNG"
    mean = sum(run["after"]["val/forward_kl"] for run in runs if run["method"] == "KD") / 2
    assert f"{mean:.3f}±" in said.out
    verdict = " ".join(said.out.split())
    assert "is best on" in verdict or "no method is better by more than chance" in verdict


def test_own_settings_come_from_files(compare):
    Path("okd_mixed.yaml").write_text(
        "method: {class_path: OKD, init_args: {on_policy_fraction: 0.5, anchor_weight: 1.0}}\n"
        "model: {learning_rate: 0.002}\n"
    )
    Path("both.yaml").write_text("trainer: {callbacks: [KD, OPDPlus]}\n")
    Path("shared.yaml").write_text("method: GKD\ntrainer: {max_steps: 2}\n")
    said = compare("--config", "shared.yaml", "--methods", "okd_mixed.yaml,both.yaml,SFT")
    assert said.status == 0, said.err
    assert [run["method"] for run in results()] == ["okd_mixed", "both", "SFT"]
    config = Path("out/runs/okd_mixed-seed0/config.yaml").read_text()
    assert "anchor_weight: 1.0" in config
    assert "learning_rate: 0.002" in config
    columns = set(read_metrics(Path("out/runs/both-seed0/metrics.csv"))[0])
    assert {"train/kd", "train/opd_plus"} <= columns
    assert "method section (GKD) is left out" in said.out


def test_a_killed_comparison_continues(compare, here):
    typed = ["--methods", "KD,GKD", "--budget", "steps=5"]
    typed += ["--trainer.callbacks+", "own_callbacks.Interrupted"]
    Path("interrupt").write_text("nowhere")
    whole = compare(*typed, "--out", "whole")
    assert whole.status == 0, whole.err
    Path("interrupt").write_text("GKD")
    stopped = compare(*typed)
    assert stopped.status == 130
    assert "the same command continues" in stopped.out
    finished = Path("out/runs/KD-seed0/result.json")
    written = finished.stat().st_mtime_ns
    assert [run["method"] for run in results()] == ["KD"]
    assert not Path("out/runs/GKD-seed0/result.json").exists()
    Path("interrupt").write_text("nowhere")
    said = compare(*typed)
    assert said.status == 0, said.err
    assert "1 of 2 runs are finished" in said.out
    assert "GKD, seed 0, from its checkpoint" in said.out
    assert finished.stat().st_mtime_ns == written
    assert [untimed(run) for run in results()] == [untimed(run) for run in results(here / "whole")]
    assert curves(Path("out")) == curves(here / "whole")
    more = compare(*typed, "--seeds", "0,1", "--methods", "SFT")
    assert more.status == 0, more.err
    assert finished.stat().st_mtime_ns == written
    assert {(run["method"], run["seed"]) for run in results()} == {
        (method, seed) for method in ("KD", "GKD", "SFT") for seed in (0, 1)
    }


def test_a_run_that_fails_does_not_lose_the_others(compare):
    typed = ["--methods", "own_callbacks.Fragile,SFT", "--budget", "steps=2"]
    Path("broken").touch()
    said = compare(*typed)
    assert said.status == 1
    assert [run["method"] for run in results()] == ["SFT"]
    assert "Fragile, seed 0: ArithmeticError: this method is broken" in said.out
    Path("broken").unlink()
    said = compare(*typed)
    assert said.status == 0, said.out
    assert [run["method"] for run in results()] == ["Fragile", "SFT"]


@pytest.mark.parametrize(
    ("unit", "amount"), [("tokens", 40), ("seconds", 0.001), ("cpu_seconds", 0.001)]
)
def test_budgets_that_are_not_steps(compare, unit, amount):
    said = compare("--methods", "GKD", "--budget", f"{unit}={amount}")
    assert said.status == 0, said.err
    (run,) = results()
    assert run[unit] >= amount
    counted = [
        float(row["train/tokens"])
        for row in read_metrics(Path("out/runs/GKD-seed0/metrics.csv"))
        if "train/tokens" in row
    ]
    assert len(counted) == run["steps"]
    if unit == "tokens":
        assert counted[-1] == run["tokens"] >= amount > counted[-2]
    else:
        assert run["steps"] == 1
    with Path("out/metrics.csv").open(newline="") as file:
        assert int(list(csv.DictReader(file))[-1]["step"]) == run["steps"]


@pytest.mark.parametrize("budget", ["tokens=40", "steps=3"])
def test_killed_after_the_last_step(compare, budget):
    """The run is finished but its result not yet written: no further step is trained."""
    typed = ["--methods", "GKD", "--budget", budget]
    assert compare(*typed).status == 0
    (before,) = results()
    Path("out/runs/GKD-seed0/result.json").unlink()
    said = compare(*typed)
    assert said.status == 0, said.out
    assert "from its checkpoint" in said.out
    (after,) = results()
    assert untimed(after) == untimed(before)


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ([], "--methods must be given"),
        (["--methods", "KDD"], "did you mean KD?"),
        (["--methods", "KD,KD"], "two contenders called KD"),
        (["--methods", "nothing.yaml"], "no such file"),
        (["--methods", "KD", "--method", "GKD"], "name the methods in --methods"),
        (["--methods", "KD", "--seeds", "a"], "--seeds 'a'"),
        (["--methods", "KD", "--budget", "steps=0"], "--budget 'steps=0'"),
        (["--methods", "KD", "--budget", "hours=1"], "seconds=N"),
        (["--methods", "KD", "--budget", "cpu_seconds=0"], "cpu_seconds=N"),
        (
            ["--methods", "GKD", "--budget", "cpu_seconds=9", *ENGINE],
            "those of --model.engine: give --budget seconds=N",
        ),
        (["--methods", "KD", "--budget", "steps=1", "--trainer.max_steps", "3"], "give one of"),
        (["--methods", "KD", "--data.bach_size", "3"], "did you mean --data.batch_size"),
        (["--methods", "KD", "--budget", "tokens=9", "--model.schedule", "cosine"], "last step"),
        (["--methods", "KD", "--trainer.callbacks+", "GKD"], "trainer.callbacks of the shared"),
        (["--methods", "measured.yaml", "--trainer.callbacks+", "GKD"], "GKD besides its own"),
        (["--methods", "KD", "--budget", "steps=1", "--trainer.min_epochs", "3"], "give one of"),
    ],
    ids=lambda value: "-".join(value[-2:]) if isinstance(value, list) else "",
)
def test_mistakes(compare, typed, words):
    Path("measured.yaml").write_text("method: KD\ntrainer: {callbacks: [ExactMatch]}\n")
    said = compare(*typed)
    assert said.status in (1, 2)
    (line,) = said.err.strip().splitlines()
    assert words in line
    assert not Path("out/runs").exists()


def test_what_is_measured_is_the_same_for_all(compare):
    Path("short.yaml").write_text("method: KD\ndata: {max_response_length: 3}\n")
    said = compare("--methods", "short.yaml")
    assert said.status == 1
    assert "sets data.max_response_length" in said.err
    Path("hinted.yaml").write_text(
        "method: KD\ndata: {teacher_prompt_template: '{prompt}{reference}'}\n"
    )
    said = compare("--methods", "KD,hinted.yaml", "--seeds", "0", "--budget", "steps=1")
    assert said.status == 0, said.err
    table = said.out.split("After training")[1].split("Cost of a run")[0]
    assert "reverse KL" not in table  # of another teacher's distribution


def test_a_budget_wins_over_the_configs_ends(compare):
    Path("ends.yaml").write_text("trainer: {min_steps: 6, max_steps: 9, max_time: '00:00:00:00'}\n")
    typed = ["--config", "ends.yaml", "--methods", "KD", "--budget", "steps=4"]
    said = compare(*typed)
    assert said.status == 0, said.err
    assert [run["steps"] for run in results()] == [4]
    assert "the config's trainer.max_time is left out" in said.out


def test_files_may_not_change_what_all_share(compare):
    Path("sly.yaml").write_text("method: KD\ntrainer: {max_steps: 9}\ndata: {val: other.jsonl}\n")
    said = compare("--methods", "sly.yaml")
    assert said.status == 1
    assert "sets trainer.max_steps, data.val" in said.err


def test_without_validation_data(compare, assets):
    said = compare("--methods", "KD", data=["--data.train", assets.train])
    assert said.status == 1
    assert "give --data.val" in said.err


def test_folder_of_something_else(compare):
    typed = ["--methods", "KD", "--budget", "steps=1"]
    assert compare(*typed).status == 0
    for change, words in (
        (["--budget", "steps=2"], "another budget (steps=1 there, steps=2 here)"),
        (["--model.learning_rate", "1e-3"], "other options"),
    ):
        said = compare(*typed, *change)
        assert said.status == 1
        assert "holds another comparison" in said.err
        assert words in said.err
    Path("notes").mkdir()
    write_jsonl(Path("notes/x.jsonl"), [])
    said = compare(*typed, "--out", "notes")
    assert said.status == 1
    assert "holds files of something else" in said.err


def test_budget_text_is_read_back():
    for text in ("steps=200", "tokens=1e7", "seconds=0.5", "cpu_seconds=600"):
        assert Budget.parse(str(Budget.parse(text))) == Budget.parse(text)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_cpu_seconds_do_not_count_a_gpu(device):
    refused = Budget.parse("cpu_seconds=60").refusal(torch.device(device), [])
    assert bool(refused) == (device == "cuda")
    assert Budget.parse("seconds=60").refusal(torch.device(device), ["--model.engine"]) is None


def test_cpu_seconds_do_not_count_servers():
    served = ServedTeacher("http://x:1")
    routed = RoutedTeachers({name: ServedTeacher("http://x:1") for name in "ab"})
    assert all(teacher.computes_elsewhere for teacher in (served, routed))
    assert ForeignTeacher(served, "tokenizer").computes_elsewhere
    assert not LoadedTeacher("folder").computes_elsewhere
    refused = Budget.parse("cpu_seconds=60").refusal(torch.device("cpu"), ["the server"])
    assert refused is not None
    assert "those of the server: give --budget seconds=N" in refused


def test_paths_are_labelled_by_class():
    (entry,) = read_entries("somewhere.else.MyKD")
    assert (entry.label, entry.config) == ("MyKD", {"method": "somewhere.else.MyKD"})
