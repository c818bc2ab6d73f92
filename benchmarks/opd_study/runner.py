"""Run an arm through the command line, in this process, and read its measures."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from okd_lightning.__main__ import main
from okd_lightning.commands.quickstart.recipe import TEACHER_DIR, TRAIN_FILE, VAL_FILE, Recipe
from opd_study.arms import Arm

MEASURES = (
    "on_policy_reverse_kl",
    "on_policy_forward_kl",
    "on_policy_jsd",
    "on_policy_entropy",
    "forward_kl",
    "reverse_kl",
    "agreement",
    "exact_match",
)
_VAL = {"tinystories": 50, "arithmetic": 150}  # optimizer steps between two validations

RECIPE = Recipe(warm_steps=500, method_steps=700, warm_learning_rate=1e-2, learning_rate=1e-2)
"""The quickstart's recipe when the study was run; the quickstart itself has shorter stages now."""


class Runner:
    """Runner of arms on the tasks' models and data.

    Args:
        shared: Folder with models/student75K, models/stories260K and datasets/.
        root: Folder of run folders and warm-started students.
    """

    def __init__(self, shared: Path, root: Path) -> None:
        self.shared, self.root = shared, root

    def run(self, arm: Arm) -> dict[str, Any]:
        """Train, with validations during training.

        Returns:
            CPU seconds (validations included), the curve as step → measures, and the error that
            stopped the run if it did not finish.
        """
        folder = Path(tempfile.mkdtemp(dir=self.root))
        task = self._task(arm)
        start = time.process_time()
        # an overlay's settings come before the typed ones
        said = _command("fit", *task, *self._budget(arm), *arm.options, *_quiet(folder))
        spent = round(time.process_time() - start, 1)
        found: dict[str, Any] = {"cpu_seconds": spent, "curve": _curve(folder / "metrics.csv")}
        return found | ({"stopped": said.error[-300:]} if said.code else {})

    def start(self, arm: Arm) -> dict[str, float]:
        """Return the measures before the first step, with GKD, which does not change them."""
        said = _command(
            "validate", *self._task(arm), "--method", "GKD", *_quiet(Path(tempfile.mkdtemp()))
        )
        pairs = [line.split() for line in said.output.splitlines() if line.startswith("val/")]
        return {name.removeprefix("val/"): float(value) for name, value in pairs}

    def _budget(self, arm: Arm) -> list[str]:
        options = {
            "--data.batch_size": arm.rows,
            "--data.samples_per_prompt": arm.samples,
            "--model.learning_rate": arm.rate,
            "--model.normalization": arm.normalization,
            "--trainer.max_steps": arm.steps,
            "--trainer.val_check_interval": min(arm.steps // 2, _VAL[arm.task]),
            "--trainer.limit_val_batches": 1.0 if arm.rows > 16 else 4,
        }
        if arm.task == "arithmetic":
            options["--data.prompts_per_epoch"] = arm.steps * arm.rows // arm.samples
        return [part for name, value in options.items() for part in (name, str(value))]

    def _task(self, arm: Arm) -> list[str]:
        return self._tinystories(arm) if arm.task == "tinystories" else self._arithmetic(arm)

    def _tinystories(self, arm: Arm) -> list[str]:
        models, data = self.shared / "models", self.shared / "datasets" / "tinystories"
        options = {
            "--config": "tinystories",
            "--seed_everything": arm.seed,
            "--model.student": models / "student75K",
            "--model.teacher": models / "stories260K",
            "--data.train": data / "train.jsonl",
            "--data.val": data / "val.jsonl",
            "--data.max_response_length": 32,
            "--data.val_rollouts": 64,
        }
        return [str(part) for pair in options.items() for part in pair]

    def _arithmetic(self, arm: Arm) -> list[str]:
        options = {
            **_problems(arm.seed),
            "--model.student": self._warm_start(arm.seed),
            "--model.teacher": TEACHER_DIR,
            "--trainer.callbacks+": "ExactMatch",
            "--data.val_rollouts": Recipe.val_rollouts,
        }
        return [str(part) for pair in options.items() for part in pair]

    def _warm_start(self, seed: int) -> Path:
        """Return the quickstart's student after its warm start; kept in the root folder."""
        out = self.root / f"warm{seed}"
        if out.exists():
            return out
        folder = Path(tempfile.mkdtemp(dir=self.root))
        recipe = RECIPE
        options = {
            **_problems(seed),
            "--model.student": json.dumps(recipe.student_config),
            "--model.learning_rate": recipe.warm_learning_rate,
            "--data.batch_size": recipe.batch_size,
            "--data.prompts_per_epoch": recipe.warm_steps * recipe.batch_size,
            "--method": "SFT",
            "--trainer.max_steps": recipe.warm_steps,
            "--trainer.limit_val_batches": 0,
            "--trainer.enable_progress_bar": "false",
            "--trainer.default_root_dir": folder,
        }
        said = _command("fit", *(str(part) for pair in options.items() for part in pair))
        last = folder / "checkpoints" / "last.ckpt"
        said = (
            said if said.code else _command("export", "--ckpt_path", str(last), "--out", str(out))
        )
        if said.code:
            raise SystemExit(said.error)
        return out


@dataclasses.dataclass(frozen=True)
class Said:
    """Result of a command.

    Attributes:
        code: Exit status.
        output: Standard output.
        error: Error output.
    """

    code: int
    output: str
    error: str


def _problems(seed: int) -> dict[str, Any]:
    return {
        "--seed_everything": seed,
        "--model.tokenizer": TEACHER_DIR,
        "--model.weight_decay": Recipe.weight_decay,
        "--model.warmup_steps": Recipe.warmup_steps,
        "--model.schedule": "cosine",
        "--data.train": TRAIN_FILE,
        "--data.val": VAL_FILE,
        "--data.max_prompt_length": 10,
        "--data.max_response_length": 16,
    }


def _quiet(folder: Path) -> list[str]:
    """Return options for no checkpoints and no progress bar."""
    return [
        *("--trainer.enable_progress_bar", "false"),
        *("--trainer.enable_checkpointing", "false"),
        *("--trainer.default_root_dir", str(folder)),
    ]


def _command(*arguments: str) -> Said:
    output, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(error):
        code = main(arguments)
    return Said(code, output.getvalue(), error.getvalue())


def _curve(path: Path) -> dict[str, dict[str, float]]:
    """Return step → measures of the validation after it."""
    if not path.exists():
        return {}
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("val/forward_kl")]
    return {
        str(int(float(row["step"])) + 1): {
            name: round(float(row[f"val/{name}"]), 5) for name in MEASURES if row.get(f"val/{name}")
        }
        for row in rows
    }
