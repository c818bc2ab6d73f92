"""The README is true.

* Its Python blocks run as they stand, in one folder, in order.
* What it lists (methods, divergences, configs, commands) exists, and all of the shelf is listed.
* It is at most 150 lines.
"""

import re
import warnings
from pathlib import Path

import pytest
import torch
from lightning import Trainer

from okd_lightning import DistillationModule, RolloutDataModule, divergences
from okd_lightning.__main__ import COMMANDS
from okd_lightning.commands.cli_arguments import packaged_configs
from okd_lightning.commands.cli_errors import method_names
from okd_lightning.commands.quickstart.recipe import TEACHER_DIR, TRAIN_FILE, Recipe

README = (Path(__file__).parents[2] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


SHELF = sorted((Path(__file__).parents[2] / "callbacks").glob("*.py"))


def run_block(word: str) -> dict:
    (block,) = [block for block in BLOCKS if word in block]
    namespace: dict = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a user's Trainer warns about loggers and workers
        exec(compile(block, "README.md", "exec"), namespace)
    return namespace


def short_fit(callbacks) -> tuple[DistillationModule, Trainer]:
    module = DistillationModule(
        Recipe().student_config, str(TEACHER_DIR), tokenizer=str(TEACHER_DIR), learning_rate=1e-2
    )
    trainer = Trainer(
        callbacks=callbacks,
        max_steps=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    data = RolloutDataModule(TRAIN_FILE, batch_size=8, max_prompt_length=10, max_response_length=16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, data)
    return module, trainer


def test_at_most_150_lines():
    assert len(README.splitlines()) <= 150


def test_python_script_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace = run_block("trainer.fit(module, data)")
    assert namespace["trainer"].global_step == 4
    assert 0 < float(namespace["trainer"].callback_metrics["val/forward_kl"]) < 10
    assert "tensor(" in capsys.readouterr().out


def test_own_divergence_trains():
    namespace = run_block("TriangularDiscrimination")
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    q = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    value = namespace["method"].divergence.value(p.log(), q.log())
    torch.testing.assert_close(value, ((q - p) ** 2 / (p + q)).sum())
    _, trainer = short_fit([namespace["method"]])
    assert float(trainer.callback_metrics["train/loss"]) > 0


def test_composed_callbacks_train():
    callbacks = run_block("own_answers")["callbacks"]
    _, trainer = short_fit(callbacks)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    expected = 0.5 * metrics["train/kd"] + metrics["train/own_answers"]
    expected += 0.1 * metrics["train/reward"]
    assert metrics["train/loss"] == pytest.approx(expected, rel=1e-5)


def test_one_table_has_all_methods():
    table = README.split("| method | what it does |")[1].split("\n\n")[0]
    rows = [row.strip("| ").split(" | ") for row in table.splitlines()[2:]]
    assert all(len(row) == 4 and row[2] for row in rows)
    listed = re.findall(r"--method callbacks\.(\w+)\.(\w+)", table)
    assert sorted(file for file, _ in listed) == [path.stem for path in SHELF]
    for file, kind in listed:
        assert f"\nclass {kind}(" in (SHELF[0].parent / f"{file}.py").read_text()


def test_listed_names_exist():
    for name in re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE):
        assert name in method_names()
    listed = README.split("Divergences (`--method.divergence NAME`)")[1].split("`TopK`")[0]
    for name in re.findall(r"`([A-Z]\w+)`", listed):
        assert issubclass(getattr(divergences, name), divergences.Divergence)
    for name in re.findall(r"--config ([\w/]+)", README):
        assert name in packaged_configs()
    for name in re.findall(r"^okd-lightning (\w+)", README, re.MULTILINE):
        assert name in COMMANDS
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert f"\n{target}:" in (Path(__file__).parents[2] / "Makefile").read_text()
