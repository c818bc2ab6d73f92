"""Run the study: `okd-lightning compare` once per table; unfinished comparisons continue.

    python benchmarks/claims/prepare.py
    python benchmarks/claims/run.py --shared FOLDER [--only few,many] [--seeds 0,1,2]

FOLDER holds models/ and datasets/. Contenders are the YAML files next to this one; everything runs
from the project's root, with one thread. A comparison's results.json and metrics.csv are added to
``results/``, so that seeds can be run separately; its plots stay in ``build/claims``.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent

_OWN = "callbacks.minillm.MiniLLM"
_GRID = [
    "gkd_lambda0_beta0.5",
    *(f"gkd_lambda{share}_beta{beta}" for share in ("0.5", "1") for beta in ("0", "0.5", "1")),
]
_SAMPLED = [
    *(f"{method}_{f}" for f in ("reverse", "forward", "jsd") for method in ("opd", "opdplus")),
    "opdplus_value_reverse",
    "opdplus_value_jsd",
]
_ENDS_OF_THE_GRID = ("gkd_lambda1_beta0", "gkd_lambda1_beta1")
_GIVEN = ("SFT", "KD", "reverse_kd", "OKD", _OWN)

TABLES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "few": (("arithmetic",), (*_GIVEN, *_GRID, *_SAMPLED)),
    "many": (("arithmetic",), (*_GIVEN, *_ENDS_OF_THE_GRID)),
    "opsd": (("arithmetic", "reader"), ("SFT", "opsd", "opsd_unclipped", "opsd_reverse")),
    "tinystories": (
        ("tinystories",),
        (*_GIVEN, *_GRID, "opd_reverse", "opdplus_value_reverse"),
    ),
    "policy_gradient": (
        ("tinystories", "policy_gradient"),
        ("KD", "gkd_lambda1_beta1", *_SAMPLED),
    ),
}
"""Table → its configs, from the general to the special, and its contenders."""


def command(table: str, shared: Path, work: Path, seeds: str) -> list[str]:
    """Return the comparison's command line."""
    methods = ",".join(_entries(TABLES[table][1]))
    out = str(work / "runs" / table)
    own = ["--methods", methods, "--out", out, "--seeds", seeds]
    return ["compare", *own, *pair_of(table, shared, work)]


def pair_of(table: str, shared: Path, work: Path) -> list[str]:
    """Return the options that name a table's models, data and optimization."""
    configs = TABLES[table][0]
    words = [word for name in configs for word in ("--config", str(HERE / f"{name}.yaml"))]
    if configs[0] == "tinystories":
        stories = shared / "datasets" / "tinystories"
        words += ["--model.student", str(shared / "models" / "student75K")]
        words += ["--model.teacher", str(shared / "models" / "stories260K")]
        words += ["--data.train", str(stories / "train.jsonl")]
        words += ["--data.val", str(stories / "val.jsonl")]
    if table == "many":
        words += ["--data.train", str(work / "many.jsonl")]
    return words


def main() -> None:
    """Run the requested tables, one after the other."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shared", type=Path, required=True, help="folder of models/, datasets/")
    parser.add_argument("--work", type=Path, default=Path("build/claims"))
    parser.add_argument("--only", default=",".join(TABLES), help="default: %(default)s")
    parser.add_argument("--seeds", default="0,1,2")
    own = parser.parse_args()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for table in own.only.split(","):
        words = command(table, own.shared, own.work, own.seeds)
        subprocess.run([sys.executable, "-m", "okd_lightning", *words], check=True, env=environment)
        keep(own.work / "runs" / table, HERE / "results" / table)


def keep(source: Path, target: Path) -> None:
    """Add a comparison's runs to those in ``target``; the same runs are replaced."""
    results = json.loads((source / "results.json").read_text(encoding="utf-8"))
    curves = _rows(source / "metrics.csv")
    again = {(run["method"], str(run["seed"])) for run in results}
    if (target / "results.json").is_file():
        before = json.loads((target / "results.json").read_text(encoding="utf-8"))
        results = [r for r in before if (r["method"], str(r["seed"])) not in again] + results
        older = _rows(target / "metrics.csv")
        curves = [r for r in older if (r["method"], r["seed"]) not in again] + curves
    target.mkdir(parents=True, exist_ok=True)
    (target / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    first = [name for name in curves[0] if not name.startswith("val/")]
    measures = sorted({name for row in curves for name in row} - set(first))
    with (target / "metrics.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*first, *measures], restval="")
        writer.writeheader()
        writer.writerows(curves)


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _entries(contenders: tuple[str, ...]) -> Iterator[str]:
    for name in contenders:
        file = HERE / "contenders" / f"{name}.yaml"
        yield str(file) if file.is_file() else name


if __name__ == "__main__":
    main()
