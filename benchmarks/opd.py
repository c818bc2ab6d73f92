"""OPD, OPD+ and the exact on-policy loss, by the command line: the effect of OPD+'s correction.

Two tasks: ``tinystories`` (75K student, 260K teacher) and ``arithmetic`` (the quickstart's student
after its warm start, and its teacher). Finished runs are kept in the JSON file and not repeated,
those of another divisor (``--normalization``) under keys that end in its name; seeds are outermost,
so that what there is can be compared. ``variance`` measures bias and variance of the sampled
gradients on the first pair.

    python benchmarks/opd.py --shared FOLDER --stage collapse variance --seeds 0 1 2
    python benchmarks/opd.py --normalization token_mean --picture docs/opd.png
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import tempfile
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from opd_study.arms import DEFAULT_NORMALIZATION, Arm
from opd_study.picture import draw
from opd_study.runner import Runner
from opd_study.stages import STAGES
from opd_study.tables import last, runs_table, variance_table
from opd_study.variance import VarianceStudy
from rich.console import Console

RESULTS = Path(__file__).parent / "results" / "opd.json"
VARIANCE = "variance"


class Kept:
    """Measurements on disk.

    Args:
        path: The JSON file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        self.versions: dict[str, dict[str, str]] = known.get("versions", {})
        self.starts: dict[str, dict[str, float]] = known.get("starts", {})
        self.runs: dict[str, dict[str, Any]] = known.get("runs", {})
        self.variance: dict[str, dict[str, Any]] = known.get(VARIANCE, {})

    def write(self, normalization: str) -> None:
        """Write everything, with the package versions of the last run with each divisor."""
        packages = ("torch", "lightning", "transformers", "torchmetrics")
        versions = {name: version(name) for name in packages}
        self.versions[normalization] = versions | {"python": platform.python_version()}
        content = {
            "versions": self.versions,
            "starts": self.starts,
            VARIANCE: self.variance,
            "runs": self.runs,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def run_arm(runner: Runner, arm: Arm, kept: Kept) -> None:
    """Run an arm that has not been run, after the initial measures of its task and seed."""
    if arm.start_key not in kept.starts:
        kept.starts[arm.start_key] = runner.start(arm)
    if arm.key not in kept.runs:
        kept.runs[arm.key] = found = runner.run(arm)
        kept.write(arm.normalization)
        print(arm.key, found["cpu_seconds"], found.get("stopped", ""), last(found), flush=True)


def run_variance(shared: Path, root: Path, kept: Kept, num_batches: int, steps: int) -> None:
    """Measure at the start, and after some steps of training."""
    at_start, after = "at the start", f"after {steps} steps of GKD with reverse KL"
    if at_start in kept.variance and after in kept.variance:
        return
    begin = time.process_time()
    study = VarianceStudy(shared, root)
    study.train(0)  # builds the models and reads the data
    kept.variance[at_start] = study.measure(num_batches)
    kept.write(DEFAULT_NORMALIZATION)
    study.train(steps)
    kept.variance[after] = study.measure(num_batches)
    kept.write(DEFAULT_NORMALIZATION)
    print(VARIANCE, round(time.process_time() - begin, 1), "CPU seconds", flush=True)


def main() -> None:
    """Run what has not been run, print the tables, write the JSON and the plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared", type=Path, help="folder with models/ and datasets/")
    parser.add_argument("--stage", nargs="+", choices=[*STAGES, VARIANCE], default=())
    parser.add_argument("--seeds", type=int, nargs="+", default=(0,), help="such as 0 1 2")
    parser.add_argument(
        "--normalization",
        default=DEFAULT_NORMALIZATION,
        help="divisor of sampled rows in the training runs",
    )
    parser.add_argument("--only", nargs="*", default=(), help="names of runs; all by default")
    parser.add_argument("--batches", type=int, default=64, help="of the variance table")
    parser.add_argument("--picture", type=Path, help="draw the collapse here")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    kept = Kept(options.out)
    arms = {
        stage: [
            replace(arm, seed=seed, normalization=options.normalization)
            for seed in options.seeds
            for arm in build()
        ]
        for stage, build in STAGES.items()
    }
    with tempfile.TemporaryDirectory() as root:
        runner = Runner(options.shared or Path(), Path(root))
        for seed in options.seeds:
            for stage in options.stage:
                if stage == VARIANCE:
                    run_variance(options.shared, Path(root), kept, options.batches, steps=100)
                    continue
                for arm in arms[stage]:
                    if arm.seed == seed and (not options.only or arm.name in options.only):
                        run_arm(runner, arm, kept)
    console = Console(width=210)
    for stage in options.stage or STAGES:
        if stage != VARIANCE:
            console.print(runs_table(stage, kept.runs, arms[stage]))
    for when, measured in kept.variance.items():
        console.print(variance_table(f"{VARIANCE} {when}", measured))
    if options.picture:
        draw(options.picture, kept.starts, kept.runs, options.normalization)


if __name__ == "__main__":
    main()
