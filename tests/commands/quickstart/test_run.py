"""The quickstart has its documented results.

* The committed teacher solves at least 98 % of the validation problems, and is below 1 MB; the
  student is several times smaller.
* A run leaves results.json, metrics.csv and a picture, and reports measures before and after
  training.
* The same seed gives the same numbers, timings apart; another seed gives others.
* GKD gets the quickstart's settings unless others are typed; other methods get none of them.
* Mistakes end in one line.
"""

import csv
import json
from pathlib import Path

import lightning
import pytest
from rich.console import Console
from transformers import AutoModelForCausalLM

from okd_lightning import GKD, KD, OKD, OPD, SFT, DistillationModule, OPDPlus, RolloutDataModule
from okd_lightning.__main__ import main
from okd_lightning.callbacks import ExactMatch
from okd_lightning.commands.quickstart import run as quickstart_run
from okd_lightning.commands.quickstart.command import with_default_method
from okd_lightning.commands.quickstart.recipe import TEACHER_DIR, TRAIN_FILE, VAL_FILE, Recipe
from okd_lightning.commands.quickstart.run import Quickstart

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
]
SMALL = Recipe(warm_steps=6, method_steps=4, batch_size=16, val_every=2, val_rollouts=8)


@pytest.fixture(scope="module", autouse=True)
def _few_problems(tmp_path_factory):
    """Validation on 32 of the 512 problems."""
    few = tmp_path_factory.mktemp("few") / "val.jsonl"
    few.write_text("".join(VAL_FILE.read_text().splitlines(keepends=True)[:32]))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(quickstart_run, "VAL_FILE", few)
        yield


@pytest.fixture(scope="module")
def first_run(tmp_path_factory):
    return run(tmp_path_factory.mktemp("first"), GKD(beta=0.0, on_policy_fraction=1.0))


def run(out: Path, method, seed: int = 0):
    console = Console(width=120, record=True, quiet=False, file=(out / "terminal.txt").open("w"))
    results = Quickstart(method, out, seed, SMALL, console).run()
    console.file.close()
    return out, results


def test_teacher_solves_the_task():
    module = DistillationModule(str(TEACHER_DIR))
    data = RolloutDataModule(val=VAL_FILE, max_prompt_length=10, max_response_length=16)
    trainer = lightning.Trainer(
        callbacks=[ExactMatch()],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    (_, *_), metrics = trainer.validate(module, data, verbose=False), trainer.callback_metrics
    assert float(metrics["val/exact_match"]) >= 0.98


def test_sizes():
    assert sum(path.stat().st_size for path in TEACHER_DIR.iterdir()) <= 1_000_000
    teacher = AutoModelForCausalLM.from_pretrained(TEACHER_DIR)
    student = DistillationModule(Recipe().student_config, tokenizer=str(TEACHER_DIR))
    student.configure_model()
    assert 3.5 * student.student.num_parameters() < teacher.num_parameters()
    assert len(TRAIN_FILE.read_text().splitlines()) <= 1000


def test_results(first_run):
    out, results = first_run
    assert [result.method for result in results] == ["SFT", "GKD"]
    records = json.loads((out / "results.json").read_text())
    sft, gkd = records
    assert sft["before"] == gkd["before"] != gkd["after"] != sft["after"]
    assert sft["steps"] == gkd["steps"] == 4
    assert sft["generated_tokens"] == 0
    assert gkd["generated_tokens"] == gkd["tokens"] > 0
    assert gkd["seconds"] > 0
    for name in ("exact_match", "forward_kl", "reverse_kl", "agreement", "on_policy_reverse_kl"):
        assert f"val/{name}" in gkd["after"]
    with (out / "metrics.csv").open(newline="") as file:
        steps = [(row["method"], int(row["step"])) for row in csv.DictReader(file)]
    assert steps == [(method, step) for method in ("SFT", "GKD") for step in (0, 2, 4)]
    assert (out / "learning_curve.png").stat().st_size > 10_000


def test_terminal_shows_numbers_and_answers(first_run):
    out, results = first_run
    text = (out / "terminal.txt").read_text()
    assert f"{results[1].after['val/forward_kl']:.3f}" in text
    for line in VAL_FILE.read_text().splitlines()[:5]:
        row = json.loads(line)
        assert row["prompt"] in text
        assert row["response"] in text  # the teacher's answer


def test_same_seed_same_numbers(first_run, tmp_path):
    _, again = run(tmp_path, GKD(beta=0.0, on_policy_fraction=1.0))
    for first, second in zip(first_run[1], again, strict=True):
        assert first.curve == second.curve
        assert (first.tokens, first.generated_tokens) == (second.tokens, second.generated_tokens)


def test_other_seed_other_numbers_and_sft_alone(first_run, tmp_path):
    _, results = run(tmp_path, SFT(), seed=1)
    (only,) = results
    assert only.method == "SFT"
    assert only.before != first_run[1][0].before


@pytest.mark.parametrize("kind", [KD, OKD, OPDPlus])
def test_any_method_runs(tmp_path, kind):
    _, (sft, other) = run(tmp_path, kind())
    assert (sft.method, other.method) == ("SFT", kind.__name__)
    assert sft.before == other.before != other.after


@pytest.mark.parametrize(("method", "rate"), [(KD(), None), (OPDPlus(), "0.001"), (OPD(), "0.001")])
def test_sampled_methods_train_at_a_lower_learning_rate(tmp_path, method, rate):
    out, _ = run(tmp_path, method)
    terminal = (out / "terminal.txt").read_text()
    stage = next(line for line in terminal.splitlines() if "with the teacher" in line)
    assert stage.endswith(f"at a learning rate of {rate}" if rate else "4 steps")


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ([], ["--method", "GKD", "--method.beta", "0.0", "--method.on_policy_fraction", "1.0"]),
        (["--method", "KD", "--seed", "1"], ["--method", "KD", "--seed", "1"]),
        (
            ["--method=GKD", "--method.divergence", "ReverseKL"],
            [
                *("--method", "GKD", "--method.on_policy_fraction", "1.0"),
                *("--method.divergence", "ReverseKL"),
            ],
        ),
    ],
)
def test_default_method(typed, expected):
    assert with_default_method(typed) == expected


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (["--method", "KKD"], "did you mean KD?"),
        (["--method.beta", "7"], "beta"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--sed", "1"], "--seed"),
    ],
)
def test_mistakes(typed, words, capsys, tmp_path):
    assert main(["quickstart", "--out", str(tmp_path), *typed]) != 0
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert words in line


def test_out_that_cannot_be_written(capsys, tmp_path):
    (tmp_path / "file").write_text("kept")
    assert main(["quickstart", "--out", str(tmp_path / "file")]) != 0
    assert "cannot be written" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "kept"
