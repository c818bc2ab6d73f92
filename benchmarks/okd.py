"""OKD against KD, reverse KD and GKD, through the public API: when does a learning teacher help?

Three tasks: ``tinystories`` (75K student, 260K teacher that was pretrained on it), ``arithmetic``
(the quickstart's student after its warm start, and its teacher, which is trained on the task) and
``gsm8k`` (the models of the first on short word problems, which neither was trained on). All
divergences are to the *base* teacher, on held-out rows. Finished runs are kept in the JSON file and
not repeated; so are the seconds per step of the stage ``equal-seconds``, until ``--measure-again``.

    python benchmarks/okd.py --shared FOLDER --task tinystories --stage main --steps 200
    python benchmarks/okd.py --shared FOLDER --task arithmetic --stage equal-seconds --steps 700
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from okd_study.arms import Arm
from okd_study.pace import measure_rounds, relative_seconds
from okd_study.stages import PACED, STAGES, equal_seconds
from okd_study.tables import line, table
from okd_study.tasks import Tasks
from rich.console import Console

RESULTS = Path(__file__).parent / "results" / "okd.json"
TASKS = ("tinystories", "arithmetic", "gsm8k")
EQUAL_SECONDS = "equal-seconds"


class Kept:
    """Finished runs and measured seconds, on disk.

    Args:
        path: The JSON file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        self.runs: dict[str, dict[str, float]] = known.get("runs", {})
        self.rounds: dict[str, dict[str, list[float]]] = known.get("cpu_seconds_a_step", {})

    def write(self) -> None:
        """Write everything, with the package versions of the last run."""
        packages = ("torch", "lightning", "transformers", "peft", "torchmetrics")
        content: dict[str, Any] = {
            "versions": {name: version(name) for name in packages}
            | {"python": platform.python_version()},
            "cpu_seconds_a_step": self.rounds,
            "runs": self.runs,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        self.path.write_text(text, encoding="utf-8")


def arms_of(stage: str, task: str, options: argparse.Namespace, kept: Kept) -> list[Arm]:
    """Return the runs of a stage on a task, over the requested seeds."""
    arms = []
    for seed in range(options.seeds):
        if stage == EQUAL_SECONDS:
            relative = relative_seconds(kept.rounds[task], PACED[-1])
            arms += equal_seconds(task, options.steps, seed, relative)
        else:
            arms += STAGES[stage](task, options.steps, seed)
    return [arm for arm in arms if not options.only or arm.name in options.only]


def run(tasks: Tasks, stage: str, task: str, options: argparse.Namespace, kept: Kept) -> list[Arm]:
    """Run what has not been run."""
    is_known = task in kept.rounds and not options.measure_again
    if stage == EQUAL_SECONDS and not is_known:
        kept.rounds[task] = measure_rounds(tasks, task, PACED)
        kept.write()
        print(task, relative_seconds(kept.rounds[task], PACED[-1]), flush=True)
    arms = arms_of(stage, task, options, kept)
    for arm in arms:
        if arm.key not in kept.runs:
            kept.runs[arm.key] = tasks.run(arm)
            kept.write()
            print(line(arm, kept.runs[arm.key]), flush=True)
    return arms


def main() -> None:
    """Run what has not been run, print the tables, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--shared", type=Path, required=True, help="folder with models/ and datasets/"
    )
    parser.add_argument("--stage", nargs="+", choices=[*STAGES, EQUAL_SECONDS], required=True)
    parser.add_argument("--task", nargs="+", choices=TASKS, required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=(), help="names of runs; all by default")
    parser.add_argument("--measure-again", action="store_true", help="the seconds per step")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    kept, tables = Kept(options.out), []
    with tempfile.TemporaryDirectory() as root:
        tasks = Tasks(options.shared, Path(root))
        for stage in options.stage:
            for task in options.task:
                arms = run(tasks, stage, task, options, kept)
                title = f"{stage}: {task}, {options.steps} steps"
                tables.append(table(title, kept.runs, arms))
    for shown in tables:
        Console(width=200).print(shown)


if __name__ == "__main__":
    main()
