"""OKD from the command line.

Frozen here: a run with an anchor and the module's own schedule trains, logs the parts of its loss
and checkpoints; a setting that leaves nothing to hold the teacher, or that cannot work, is one line
on stderr that says what to do.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from cli_workbench import QUIET, Assets, Result, read_checkpoint_weights, read_metrics

RUN = Path("run")
PARTS = ("student_loss", "online_module_loss", "online_module_divergence", "teacher_shift")
MODULE = "--method.online_module"


def test_an_anchor_and_an_own_schedule(fit: Callable[..., Result]) -> None:
    fit(
        *("--method", "OKD", "--method.anchor_weight", "0.1", "--method.alpha", "1"),
        *("--method.learning_rate", "1e-2", "--method.schedule", "linear"),
        *("--method.warmup_steps", "2", "--model.gradient_checkpointing", "true"),
        *("--trainer.callbacks+=LearningRateMonitor",),
    )
    rows = read_metrics(RUN / "metrics.csv")
    for row in (row for row in rows if "train/loss" in row):
        student, module, divergence, shift = (float(row[f"train/{name}"]) for name in PARTS)
        assert float(row["train/loss"]) == pytest.approx(student + module, rel=1e-4)
        assert module == pytest.approx(divergence + 0.1 * shift, rel=1e-4)
    assert max(float(row.get("val/adapted_teacher_shift", 0)) for row in rows) > 0
    rates = [
        float(row["lr-AdamW/online_module"]) for row in rows if row.get("lr-AdamW/online_module")
    ]
    assert rates == pytest.approx([0.005, 0.01, 0.01, 0.0075, 0.005, 0.0025])
    weights = read_checkpoint_weights(RUN / "checkpoints" / "last.ckpt")
    assert any(name.startswith("teacher.") and "lora_" in name for name in weights)


MISTAKES = [
    (["--method.alpha", "1"], ["alpha 1 leaves no loss", "[0, 1)", "anchor_weight above 0"]),
    (["--method.alpha", "1.5"], ["alpha must be between 0 and 1, got 1.5"]),
    (["--method.anchor_weight", "-0.1"], ["anchor_weight", "from 0 on", "-0.1"]),
    (["--method.anchor_weight", "x"], ["--method.anchor_weight", "a number", "'x'"]),
    (["--method.anchor_wight", "1"], ["no setting 'anchor_wight'", "mean anchor_weight?"]),
    (
        ["--method.on_policy_fraction", "1"],
        ["on_policy_fraction 1", "no dataset responses", "[0, 1)", "anchor_weight above 0"],
    ),
    (["--method.warmup_steps", "-1"], ["warmup_steps", "from 0 on", "-1"]),
    (["--method.schedule", "cosin"], ["constant or linear or cosine", "'cosin'"]),
    ([MODULE, "LoraConfig", f"{MODULE}.bias", "all"], ["bias 'all'", "base", "'none'"]),
    (
        [
            *(MODULE, "PrefixTuningConfig", f"{MODULE}.num_virtual_tokens", "2"),
            *("--model.gradient_checkpointing", "true"),
        ],
        ["PrefixTuningConfig", "attention cache", "gradient_checkpointing off"],
    ),
]


@pytest.mark.parametrize(("argv", "words"), MISTAKES, ids=lambda value: " ".join(value)[-60:])
def test_a_mistake_is_one_line(
    okd: Callable[..., Result], assets: Assets, here: Path, argv: list[str], words: list[str]
) -> None:
    base = [*assets.models, *assets.data, *QUIET, "--trainer.default_root_dir", "run"]
    result = okd("fit", *base, "--method", "OKD", *argv)
    lines = [line for line in result.err.splitlines() if line.startswith("okd-lightning: ")]
    assert result.status in (1, 2)
    assert "Traceback" not in result.err
    assert len(lines) == 1, result.err
    missing = [word for word in words if word not in lines[0]]
    assert not missing, lines[0]
    assert not RUN.exists()
