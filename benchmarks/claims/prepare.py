"""Prepare the study's data and students: arithmetic problems, and students after a warm start.

* ``many.jsonl``: 25,600 problems, so that 400 steps of 64 read each of them once;
* ``hinted.jsonl``: the quickstart's 400 problems, and 3,200 others after their solution;
* ``student``: the quickstart's student after its warm start on its 400 problems;
* ``reader``: the same architecture after SFT on ``hinted.jsonl``: it solves some problems, and
  copies a solution that precedes the problem. OPSD's teacher has to be able to read one.

    python benchmarks/claims/prepare.py --work build/claims
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import yaml

from okd_lightning.commands.quickstart.recipe import TEACHER_DIR, TRAIN_FILE, VAL_FILE, Recipe
from okd_lightning.commands.quickstart.task import (
    NUM_TRAIN,
    TRAIN_SEED,
    draw_problems,
    val_problems,
)

NUM_MANY, NUM_HINTED = 25_600, 3_200
WARM_STEPS, READER_STEPS = 500, 1500


def main() -> None:
    """Write all files; existing ones are kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Plain)
    parser.add_argument("--work", type=Path, default=Path("build/claims"))
    work: Path = parser.parse_args().work
    work.mkdir(parents=True, exist_ok=True)
    rows = [asdict(p) for p in draw_problems(NUM_MANY, TRAIN_SEED, exclude=set(val_problems()))]
    _write_rows(work / "many.jsonl", rows)
    hinted = [
        {**row, "prompt": f"{row['response']}={row['prompt']}"}
        for row in rows[NUM_TRAIN : NUM_TRAIN + NUM_HINTED]
    ]
    _write_rows(work / "hinted.jsonl", rows[:NUM_TRAIN] + hinted)
    _warm_start(work / "student", str(TRAIN_FILE), WARM_STEPS, 1e-2)
    _warm_start(work / "reader", str(work / "hinted.jsonl"), READER_STEPS, 3e-3)


class _Plain(argparse.RawDescriptionHelpFormatter):
    pass


def _write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def _warm_start(folder: Path, train: str, steps: int, learning_rate: float) -> None:
    """Train with SFT from random weights, and export the student."""
    if folder.is_dir():
        return
    run = folder.with_name(f"{folder.name}-run")
    options = {
        "--model.student": yaml.safe_dump(Recipe().student_config, default_flow_style=True),
        "--model.tokenizer": TEACHER_DIR,
        "--model.learning_rate": learning_rate,
        "--model.weight_decay": 0.1,
        "--model.warmup_steps": 50,
        "--model.schedule": "cosine",
        "--data.train": train,
        "--data.val": VAL_FILE,
        "--data.batch_size": 64,
        "--data.max_prompt_length": 32,
        "--data.max_response_length": 16,
        "--trainer.max_steps": steps,
        "--trainer.max_epochs": -1,
        "--trainer.val_check_interval": steps,
        "--trainer.gradient_clip_val": 1.0,
        "--trainer.default_root_dir": run,
        "--method": "SFT",
        "--seed_everything": 0,
    }
    words = [str(word) for option in options.items() for word in option]
    _okd_lightning("fit", *words)
    checkpoint = run / "checkpoints" / "last.ckpt"
    _okd_lightning("export", "--ckpt_path", str(checkpoint), "--out", str(folder))


def _okd_lightning(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "okd_lightning", *words], check=True)


if __name__ == "__main__":
    main()
