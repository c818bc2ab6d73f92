"""Settings that Lightning, torch or PEFT refuse with their own messages end in one line as well.

Frozen here: status 1 or 2, one line, no "unexpected", and the setting or its value is named.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from cli_workbench import QUIET, Assets, Result

Type = Callable[..., Result]

TWICE = [f"--trainer.callbacks+={name}" for name in ("LastCheckpoint", "LastCheckpoint")]
MISTAKES = {
    "monitor of nothing": (
        ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor", "nothing"],
        "nothing",
    ),
    "negative seed": (["--seed_everything=-5"], "-5"),
    "folder as a checkpoint": (["--ckpt_path", "."], "'.'"),
    "adapter's dropout": (
        ["--model.student_adapter", "LoraConfig", "--model.student_adapter.lora_dropout=[1]"],
        "lora_dropout",
    ),
    "adapter's rank": (
        ["--model.student_adapter", "LoraConfig", "--model.student_adapter.r=0x1g"],
        "student_adapter.r",
    ),
    "no batches": (["--trainer.limit_train_batches", "0"], "limit_train_batches 0"),
    "negative epochs": (["--trainer.min_epochs=-7"], "min_epochs"),
    "two of a kind": (TWICE, "two LastCheckpoint"),
    "section of a list": (["--config", "list.yaml"], "section model"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_one_line(mistake: str, okd: Type, assets: Assets, here: Path) -> None:
    words, named = MISTAKES[mistake]
    Path("list.yaml").write_text("model: [1, 2]\n")
    steps = ["--trainer.max_steps", "2", "--trainer.val_check_interval", "1"]
    result = okd("fit", "--method", "KD", assets.models, assets.data, QUIET, steps, words)
    assert result.status in (1, 2)
    (line,) = result.err.strip().splitlines()
    assert named in line
    assert "unexpected" not in line


def test_a_config_without_memory_for_it(okd: Type, assets: Assets) -> None:
    huge = "{model_type: llama, hidden_size: 1000000000, num_hidden_layers: 1}"
    words = ["--model.student", huge, "--model.tokenizer", str(assets.tokenizer)]
    result = okd("fit", "--method", "SFT", words, assets.data, QUIET, "--trainer.max_steps", "1")
    assert result.status == 1
    assert "--model.student: there is no memory" in result.err
