"""A folder as a reader has it: a small pair, data, and own files under the pages' names."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from process_state import unchanged_process
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from okd_lightning.__main__ import main
from okd_lightning.commands.quickstart.recipe import TEACHER_DIR, TRAIN_FILE, Recipe

RUN = {
    "model": {"student": "STUDENT", "teacher": "TEACHER"},
    "data": {
        **{"train": "train.jsonl", "val": "val.jsonl"},
        **{"max_prompt_length": 12, "max_response_length": 12, "val_rollouts": 2},
    },
    "method": {"class_path": "KD"},
    "trainer": {"default_root_dir": "runs/mine", "max_steps": 2, "accelerator": "cpu"},
}
MY_TOOLS = """
from okd_lightning.tools import Calculator


class Clock(Calculator):
    name = "clock"
"""


@pytest.fixture(scope="session")
def reader_folder(tmp_path_factory) -> Path:
    """STUDENT and TEACHER, train.jsonl and val.jsonl, run.yaml and my_run.yaml, my_tools.py."""
    folder = tmp_path_factory.mktemp("reader")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = dict(Recipe(hidden_size=16, num_layers=1).student_config)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(vocab_size=17, **config))
    model.save_pretrained(folder / "STUDENT")
    AutoTokenizer.from_pretrained(TEACHER_DIR).save_pretrained(folder / "STUDENT")
    shutil.copytree(TEACHER_DIR, folder / "TEACHER")
    rows = TRAIN_FILE.read_text().splitlines(keepends=True)
    (folder / "train.jsonl").write_text("".join(rows[:24]))
    (folder / "val.jsonl").write_text("".join(rows[24:36]))
    for name in ("run.yaml", "my_run.yaml"):
        (folder / name).write_text(yaml.safe_dump(RUN))
    (folder / "my_tools.py").write_text(MY_TOOLS)
    return folder


@pytest.fixture(scope="session")
def checkpoint(reader_folder, tmp_path_factory) -> Path:
    """Checkpoint of a short run, for commands that name one and are only parsed."""
    folder = tmp_path_factory.mktemp("checkpoint")
    config = json.loads(json.dumps(RUN))
    config["trainer"] |= {"default_root_dir": str(folder), "max_steps": 1}
    config["model"] = {side: str(reader_folder / name) for side, name in RUN["model"].items()}
    for name in ("train", "val"):
        config["data"][name] = str(reader_folder / f"{name}.jsonl")
    path = folder / "one.yaml"
    path.write_text(yaml.safe_dump(config))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert main(["fit", "--config", str(path), "--trainer.enable_progress_bar", "false"]) == 0
    return folder / "checkpoints" / "last.ckpt"


@pytest.fixture
def here(reader_folder, tmp_path, monkeypatch) -> Path:
    """The current folder: a reader's."""
    shutil.copytree(reader_folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def _leave_the_process_as_it_was() -> Iterator[None]:
    """Commands extend the module path, seed, and import what lies in a page's folder."""
    modules = set(sys.modules)
    with unchanged_process():
        yield
    for name in set(sys.modules) - modules:
        if name.startswith("my_"):
            del sys.modules[name]
