"""Comparison of the order that ``diagnose`` forecasts with the order that ``compare`` finds.

``diagnose`` takes a few steps of each of seven methods from the same weights and then restores the
weights; the order of the divergences after these steps is its forecast. Here it runs on the pairs
of the study's tables. For every pair of methods: is the method with the better forecast better
after whole runs? Where the first steps of every method make a measure worse, ``diagnose`` makes no
forecast; these cases are counted separately. Needs the results of ``run.py``; writes
``results/ranking.json``.

    python benchmarks/claims/ranking.py --shared FOLDER
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from run import HERE, pair_of

TABLES = ("few", "many", "tinystories", "policy_gradient")
CONTENDERS = {
    "SFT": "SFT",
    "KD": "KD",
    "KD, reverse KL": "reverse_kd",
    "GKD, forward KL": "gkd_lambda1_beta0",
    "GKD, reverse KL": "gkd_lambda1_beta1",
    "OPD": "opd_reverse",
    "OPDPlus": "opdplus_value_reverse",
}
"""Name of a trial → name in the study."""

MEASURES = {
    "given/forward_kl": "val/forward_kl",
    "given/reverse_kl": "val/reverse_kl",
    "student/reverse_kl": "val/on_policy_reverse_kl",
}
"""Measure of a trial → measure of a run."""


def main() -> None:
    """Diagnose every pair, and count."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shared", type=Path, required=True, help="folder of models/, datasets/")
    parser.add_argument("--work", type=Path, default=Path("build/claims"))
    own = parser.parse_args()
    found = []
    for table in TABLES:
        results = json.loads((HERE / "results" / table / "results.json").read_text())
        seeds = sorted({result["seed"] for result in results})
        for seed in seeds:
            changes = forecast(table, seed, own.shared, own.work)
            runs = {r["method"]: r["after"] for r in results if r["seed"] == seed}
            found += [judge(table, seed, name, changes, runs) for name in MEASURES]
    path = HERE / "results" / "ranking.json"
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    Console().print(summary(found))


def forecast(table: str, seed: int, shared: Path, work: Path) -> dict[str, Mapping[str, float]]:
    """Return the forecast of ``diagnose``: trial → measure → change."""
    out = work / "diagnoses" / f"{table}-seed{seed}"
    if not (out / "diagnosis.json").is_file():
        words = [*pair_of(table, shared, work), "--out", str(out), "--data.seed", str(seed)]
        command = [sys.executable, "-m", "okd_lightning", "diagnose", *words]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    trials = json.loads((out / "diagnosis.json").read_text(encoding="utf-8"))["trials"]
    return {t["method"]: {n: c["mean"] for n, c in t["change"].items()} for t in trials}


def judge(
    table: str,
    seed: int,
    measure: str,
    changes: Mapping[str, Mapping[str, float]],
    runs: Mapping[str, Mapping[str, float]],
) -> dict[str, Any]:
    """Count the pairs of methods whose order was forecast correctly."""
    tried = [name for name, run in CONTENDERS.items() if name in changes and run in runs]
    foretold = {name: changes[name][measure] for name in tried}
    came = {name: runs[CONTENDERS[name]][MEASURES[measure]] for name in tried}
    pairs = list(itertools.combinations(tried, 2))
    right = sum((foretold[a] < foretold[b]) == (came[a] < came[b]) for a, b in pairs)
    return {
        "table": table,
        "seed": seed,
        "measure": MEASURES[measure],
        "is forecast": min(foretold.values()) < 0,
        "pairs": len(pairs),
        "right": right,
        "first foretold": min(tried, key=foretold.__getitem__),
        "first found": min(tried, key=came.__getitem__),
        "foretold": foretold,
        "found": came,
    }


def summary(found: list[dict[str, Any]]) -> Table:
    """Return a table with a line per table and measure, over seeds."""
    shown = Table(title="Forecasts of diagnose against what compare found")
    for name in ("table", "measure", "seeds", "pairs in order", "first method right"):
        shown.add_column(name)
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for one in found:
        groups.setdefault((one["table"], one["measure"]), []).append(one)
    for (table, measure), group in groups.items():
        shown.add_row(table, measure, str(len(group)), *_counts(group))
    shown.add_section()
    for label, is_forecast in (("some first steps help", True), ("all of them hurt", False)):
        group = [one for one in found if one["is forecast"] == is_forecast]
        shown.add_row(label, "", "", *_counts(group))
    return shown


def _counts(found: list[dict[str, Any]]) -> tuple[str, str]:
    right, pairs = (sum(one[name] for one in found) for name in ("right", "pairs"))
    firsts = sum(one["first foretold"] == one["first found"] for one in found)
    return f"{right} of {pairs}", f"{firsts} of {len(found)}"


if __name__ == "__main__":
    main()
