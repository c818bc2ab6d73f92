"""Every file in ``configs/`` is parsed, instantiated and run for a step.

* Complete configs run on the quickstart's small models and data in place of their own.
* Overlays run on top of one of them; those of several processes start two, by Lightning itself, as
  torchrun does, and as SLURM's srun does, as if on two nodes; those that name a server have one
  that speaks vLLM's protocol.
* Real pairs and their tasks are run in test_real_pairs.py.
* A config that nobody runs fails the suite.
"""

import csv
import importlib
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import real_pairs
from fake_judge import fake_judge
from fake_vllm_server import FakeVLLM, serving
from forked import ForkedCommand, type_on_ranks
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from okd_lightning.__main__ import main
from okd_lightning.commands.cli_arguments import packaged_configs
from okd_lightning.commands.quickstart.recipe import TEACHER_DIR, TRAIN_FILE, VAL_FILE

SHELF = Path(__file__).parents[2] / "callbacks"
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
    records = [{"question": row["prompt"], "answer": f"#### {row['response']}"} for row in rows]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return ["--data.train", str(path), "--data.val", str(path)]


def shelf(folder: Path) -> list[str]:
    """Copy the shelf's files into the current folder, as in a checkout."""
    shutil.copytree(SHELF, folder / "callbacks")
    return []


RUNS = {
    "tinystories": lambda folder: [*MODELS, *DATA],
    "gsm8k": lambda folder: [*TOKENIZER, *questions(folder)],
    "opsd": lambda folder: [*TOKENIZER, *questions(folder), *shelf(folder)],
    "quickstart_teacher": lambda folder: [*TOKENIZER, *DATA],
}
OVERLAYS = {  # with their rows in metrics.csv
    "overlays/okd_on_rollouts": {"train/okd"},
    "overlays/okd_opd_plus": {"train/okd", "train/opd_plus"},
    "overlays/kd_opd_plus_reward": {"train/kd", "train/opd_plus", "train/reward"},
    "overlays/sft_gkd_opd_plus": {"train/sft", "train/gkd", "train/opd_plus", "train/kd"},
}
LAUNCHED = {  # overlays of several processes, with what makes this machine one of theirs
    "overlays/cpu2": [],
    "overlays/ddp": ["--trainer.devices", "2"],
}
TORCHRUN, SLURM = "overlays/fsdp2", "overlays/slurm"
SERVERS = {  # with the option that says where the server is
    "overlays/vllm_server": ("--model.engine.url", {"val/on_policy_reverse_kl"}),
    "overlays/teacher_server": ("--model.teacher.url", {"val/on_policy_top_k_reverse_kl"}),
}
REWARDS = {  # overlays with a reward from a model, with the option that says which
    "overlays/kd_opd_plus_reward_model": "--trainer.callbacks.function.path",
    "overlays/kd_opd_plus_judge": "--trainer.callbacks.function.url",
}


def test_every_config_is_run_here():
    run = {*RUNS, *OVERLAYS, *LAUNCHED, *SERVERS, *REWARDS, TORCHRUN, SLURM}
    assert set(packaged_configs()) == run | real_pairs.CONFIGS


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


def test_a_config_that_needs_the_shelf_says_so_in_its_first_line():
    configs = SHELF.parent / "configs"
    needing = [p for p in configs.rglob("*.yaml") if "class_path: callbacks." in p.read_text()]
    assert [path.stem for path in needing] == ["opsd"]
    for path in needing:
        assert path.read_text().startswith("# Needs a checkout: its method is on the shelf")


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")  # the libraries', not ours
def test_outside_a_checkout_the_shelf_is_missed_clearly(tmp_path, monkeypatch, capsys):
    """The error names the missing shelf; the option that the config advises then works."""
    monkeypatch.chdir(tmp_path)
    elsewhere = [p for p in sys.path if Path(p or ".").resolve() != SHELF.parent]
    monkeypatch.setattr(sys, "path", elsewhere)
    for name in [name for name in sys.modules if name.partition(".")[0] == "callbacks"]:
        monkeypatch.delitem(sys.modules, name)
    arguments = ["fit", "--config", "opsd", *TOKENIZER, *questions(tmp_path), *SHORT]
    assert main(arguments) != 0
    message = capsys.readouterr().err
    assert "callbacks.opsd.OPSD: cannot be imported" in message
    assert "run this in a checkout, or copy the method's file into ./callbacks/" in message
    assert len(message.strip().splitlines()) == 1
    divergence = ["--method.divergence", "ForwardKL", "--method.on_policy_fraction", "1"]
    assert main([*arguments, "--method", "GKD", *divergence]) == 0, capsys.readouterr().err
    (tmp_path / "callbacks").mkdir()
    shutil.copy(SHELF / "opsd.py", tmp_path / "callbacks")
    importlib.invalidate_caches()  # the folder was not there when this process looked
    assert main(arguments) == 0, capsys.readouterr().err


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")  # the libraries', not ours
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_overlay_trains(overlay, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    base = ["--config", "tinystories", *RUNS["tinystories"](tmp_path), *SHORT]
    base += ["--data.batch_size", "8"]  # two prompts of four samples: one of each kind
    if overlay == "overlays/sft_gkd_opd_plus":  # its last stages begin at step 100
        base += ["--trainer.max_steps", "102", "--trainer.val_check_interval", "102"]
        base += ["--data.max_response_length", "4"]
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


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")  # the libraries', not ours
@pytest.mark.parametrize("overlay", REWARDS)
def test_overlay_with_a_reward_from_a_model_trains(overlay, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    fields = {"vocab_size": 512, "hidden_size": 16, "intermediate_size": 16, "num_labels": 1}
    fields |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    LlamaForSequenceClassification(LlamaConfig(**fields)).save_pretrained("reward")
    AutoTokenizer.from_pretrained(TEACHER_DIR).save_pretrained("reward")
    with fake_judge(lambda content: "Score: 7") as judge:
        place = "reward" if "model" in overlay else judge.url
        words = ["--config", "tinystories", *MODELS, *DATA, *SHORT, "--data.batch_size", "8"]
        status = main(["fit", *words, "--config", overlay, REWARDS[overlay], place])
    assert status == 0, capsys.readouterr().err
    (folder,) = (tmp_path / "runs").iterdir()
    columns = set((folder / "metrics.csv").read_text().splitlines()[0].split(","))
    assert {"train/kd", "train/opd_plus", "train/reward", "rollout/reward"} <= columns
    assert bool(judge.bodies) == ("judge" in overlay)


def command(folder: Path, overlay: str, *more: str) -> list[str]:
    """``-m okd_lightning fit`` of TinyStories' config with an overlay."""
    base = "tinystories"
    return [
        *("-m", "okd_lightning", "fit", "--config", base, "--config", overlay),
        *(*RUNS[base](folder), *SHORT, "--trainer.default_root_dir", str(folder / "run"), *more),
    ]


def run(folder: Path, arguments: list[str], **environment: str) -> str:
    """Run a process that must succeed; return its stderr."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stderr


@pytest.mark.parametrize("overlay", LAUNCHED)
def test_an_overlay_of_two_processes_trains(overlay, tmp_path):
    """The first starts its second process by Lightning's launcher, the others find both."""
    words = command(tmp_path, overlay, *LAUNCHED[overlay])
    by_launcher = overlay == next(iter(LAUNCHED))
    started = run(tmp_path, words) if by_launcher else type_on_ranks(words[2:], tmp_path)
    assert "MEMBER: 2/2" in started
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")  # the libraries', not ours
def test_the_sharded_overlay_trains_resumes_and_exports(tmp_path, monkeypatch, capsys):
    """On two processes, as under torchrun; a folder of shards is a checkpoint like another."""
    type_on_ranks(command(tmp_path, TORCHRUN, "--trainer.devices", "2")[2:], tmp_path)
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert sorted(path.name for path in last.glob("*.distcp")) == ["__0_0.distcp", "__1_0.distcp"]
    type_on_ranks(["fit", "--ckpt_path", str(last), "--trainer.max_steps", "3"], tmp_path)
    metrics = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    steps = [row["step"] for row in csv.DictReader(metrics) if row["train/loss"]]
    assert steps == ["0", "1", "2"]
    monkeypatch.chdir(tmp_path)
    exported = ["export", "--ckpt_path", str(last), "--out", "student"]
    assert main(exported) == 0, capsys.readouterr().err
    assert (tmp_path / "student" / "model.safetensors").is_file()
    one = ["--trainer.strategy", "auto", "--trainer.devices", "1"]
    assert main(["validate", "--ckpt_path", str(last), *one]) == 0, capsys.readouterr().err


def test_the_slurm_overlay_trains_on_two_nodes(tmp_path):
    """Two tasks run with the variables of two nodes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job = {
        **{"SLURM_JOB_ID": "12345", "SLURM_JOB_NAME": "okd", "SLURM_NTASKS": "2"},
        **{"SLURM_NTASKS_PER_NODE": "1", "SLURM_NODELIST": "localhost", "SLURM_NNODES": "2"},
        **{"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"},
    }
    tasks = [
        ForkedCommand(
            command(tmp_path, SLURM, "--trainer.devices", "1")[2:],
            tmp_path,
            {**os.environ, **job, **_task(node)},
        )
        for node in range(2)
    ]
    for task in tasks:
        _, errors = task.communicate(timeout=300)
        assert task.returncode == 0, errors[-2000:]
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert sorted(path.name for path in last.glob("*.distcp")) == ["__0_0.distcp", "__1_0.distcp"]


def _task(node: int) -> dict[str, str]:
    return {"SLURM_PROCID": str(node), "SLURM_LOCALID": "0", "SLURM_NODEID": str(node)}
