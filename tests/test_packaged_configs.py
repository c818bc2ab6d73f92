"""Every file in ``configs/`` is parsed, instantiated and run for a step.

* Complete configs run on the quickstart's small models and data in place of their own.
* Overlays run on top of one of them; the two-process overlay starts two processes, and those that
  name a server have one that speaks vLLM's protocol.
* A config that nobody runs here fails the suite.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fake_vllm_server import FakeVLLM, serving
from transformers import AutoModelForCausalLM, AutoTokenizer

from okd_lightning.__main__ import main
from okd_lightning.cli_arguments import packaged_configs
from okd_lightning.quickstart.recipe import TEACHER_DIR, TRAIN_FILE, VAL_FILE

MODELS = ["--model.student", str(TEACHER_DIR), "--model.teacher", str(TEACHER_DIR)]
TOKENIZER = ["--model.tokenizer", str(TEACHER_DIR)]
DATA = ["--data.train", str(TRAIN_FILE), "--data.val", str(VAL_FILE)]
SHORT = [
    *("--data.batch_size", "4", "--data.max_prompt_length", "12"),
    *("--data.max_response_length", "12", "--data.val_rollouts", "2"),
    *("--trainer.max_steps", "2", "--trainer.val_check_interval", "1"),
    *("--trainer.limit_val_batches", "1", "--trainer.log_every_n_steps", "1"),
    *("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
]


def questions(folder: Path) -> list[str]:
    """Rows with GSM8K's columns, in the quickstart's alphabet."""
    path = folder / "questions.jsonl"
    rows = [json.loads(line) for line in TRAIN_FILE.read_text().splitlines()[:20]]
    records = [{"question": row["prompt"], "answer": row["response"]} for row in rows]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return ["--data.train", str(path), "--data.val", str(path)]


RUNS = {
    "tinystories": lambda folder: [*MODELS, *DATA],
    "gsm8k": lambda folder: [*TOKENIZER, *questions(folder)],
    "opsd": lambda folder: [*TOKENIZER, *questions(folder)],
    "quickstart_teacher": lambda folder: [*TOKENIZER, *DATA],
}
OVERLAYS = {  # with what stands in metrics.csv because of them
    "overlays/okd_on_rollouts": {"train/okd"},
    "overlays/okd_opd_plus": {"train/okd", "train/opd_plus"},
    "overlays/kd_opd_plus_reward": {"train/kd", "train/opd_plus", "train/reward"},
    "overlays/sft_gkd_opd_plus": {"train/sft"},
}
TWO_PROCESSES = "overlays/cpu2"
SERVERS = {  # with the option that says where the server is
    "overlays/vllm_server": ("--model.engine.url", {"val/on_policy_reverse_kl"}),
    "overlays/teacher_server": ("--model.teacher_server.url", {"val/on_policy_top_k_reverse_kl"}),
}


def test_every_config_is_run_here():
    assert set(packaged_configs()) == {*RUNS, *OVERLAYS, *SERVERS, TWO_PROCESSES}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")  # the libraries', not ours
@pytest.mark.parametrize("name", RUNS)
def test_config_trains(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    status = main(["fit", "--config", name, *RUNS[name](tmp_path), *SHORT])
    assert status == 0, capsys.readouterr().err
    (folder,) = (tmp_path / "runs").iterdir()
    text = (folder / "metrics.csv").read_text()
    assert "train/loss" in text.splitlines()[0]
    assert len(text.splitlines()) >= 5
    assert (folder / "checkpoints" / "last.ckpt").is_file()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")  # the libraries', not ours
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_overlay_trains(overlay, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    base = ["--config", "tinystories", *RUNS["tinystories"](tmp_path), *SHORT]
    base += ["--data.batch_size", "8"]  # two prompts of four samples: one of each kind
    status = main(["fit", *base, "--config", overlay])
    assert status == 0, capsys.readouterr().err
    (folder,) = (tmp_path / "runs").iterdir()
    columns = set((folder / "metrics.csv").read_text().splitlines()[0].split(","))
    assert OVERLAYS[overlay] <= columns


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")  # the libraries', not ours
@pytest.mark.parametrize("overlay", SERVERS)
def test_overlay_with_a_server_trains(overlay, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    option, expected = SERVERS[overlay]
    models = MODELS[:2] if "teacher" in overlay else MODELS
    base = ["--config", "tinystories", *models, *DATA, *SHORT]
    tokenizer = AutoTokenizer.from_pretrained(TEACHER_DIR)
    with serving(FakeVLLM(AutoModelForCausalLM.from_pretrained(TEACHER_DIR), tokenizer)) as fake:
        own = [*TOKENIZER, option, fake.url]
        if overlay == "overlays/vllm_server":
            own += ["--model.engine.sync_folder", str(tmp_path / "weights")]
        status = main(["fit", *base, "--config", overlay, *own])
    assert status == 0, capsys.readouterr().err
    assert fake.bodies("/v1/completions")
    (folder,) = (tmp_path / "runs").iterdir()
    assert expected <= set((folder / "metrics.csv").read_text().splitlines()[0].split(","))


def test_the_two_process_overlay_trains(tmp_path):
    base, overlay = "tinystories", TWO_PROCESSES
    done = subprocess.run(
        [
            *(sys.executable, "-m", "okd_lightning", "fit", "--config", base, "--config", overlay),
            *(*RUNS[base](tmp_path), *SHORT, "--trainer.default_root_dir", str(tmp_path / "run")),
        ],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "MEMBER: 2/2" in done.stderr
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file()
