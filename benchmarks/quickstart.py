"""The quickstart's result over seeds, and over settings that change rounding alone.

    python benchmarks/quickstart.py --seeds 0 1 2 3 4 5 6 7 --settings plain
    python benchmarks/quickstart.py --seeds 0 1 --settings two_threads onednn mkl no_vectors
    python benchmarks/quickstart.py --seeds 0 1 2 --settings plain --methods OKD OPDPlus

Runs ``okd-lightning quickstart`` in a process for each seed, setting and method; a run whose result
is in the file is skipped. Prints a table of exact match on the validation problems.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

SETTINGS = {
    "plain": {"OMP_NUM_THREADS": "1"},
    "two_threads": {"OMP_NUM_THREADS": "2"},
    "onednn": {"OMP_NUM_THREADS": "1", "OKD_ONEDNN": "1"},
    "mkl": {"OMP_NUM_THREADS": "1", "OKD_ONEDNN": "0"},
    "no_vectors": {"OMP_NUM_THREADS": "1", "ATEN_CPU_CAPABILITY": "default"},
}
"""Name of a setting → environment variables of the process."""

RESULTS = Path(__file__).parent / "results" / "quickstart.json"


def run(seed: int, setting: str, method: str) -> dict[str, Any]:
    """Run the quickstart once.

    Returns:
        Exact match before and after by method, the smallest of each curve, and the seconds.
    """
    with tempfile.TemporaryDirectory() as out:
        words = ["quickstart", "--seed", str(seed), "--out", out]
        words += ["--method", method] if method != "GKD" else []
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "okd_lightning", *words],
            env={**os.environ, **SETTINGS[setting]},
            check=True,
            stdout=subprocess.DEVNULL,
        )
        seconds = time.perf_counter() - start
        results = json.loads((Path(out) / "results.json").read_text())
    name = "val/exact_match"
    found = {
        result["method"]: {
            "before": round(result["before"][name], 4),
            "after": round(result["after"][name], 4),
            "cpu_seconds": round(result["cpu_seconds"], 1),
        }
        for result in results
    }
    machine = {"torch": torch.__version__, "kernels": torch.backends.cpu.get_cpu_capability()}
    key = {"seed": seed, "setting": setting, "method": method}
    return {**key, "exact_match": found, "seconds": round(seconds, 1), **machine}


def table(runs: Sequence[dict[str, Any]]) -> str:
    """Return a row for each setting and method, with the range and median over seeds."""
    lines = ["| setting | method | seeds | before | SFT continued | method |", "|" + "---|" * 6]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for one in runs:
        groups.setdefault((one["setting"], one["method"]), []).append(one["exact_match"])
    for (setting, method), found in groups.items():
        columns = [
            [one["SFT"]["before"] for one in found],
            [one["SFT"]["after"] for one in found],
            [one[method]["after"] for one in found],
        ]
        shown = [f"{min(c):.2f}–{max(c):.2f} ({statistics.median(c):.2f})" for c in columns]
        lines.append(f"| {setting} | {method} | {len(found)} | {' | '.join(shown)} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing in the results, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, nargs="*", default=[])
    parser.add_argument("--settings", nargs="*", default=["plain"], choices=SETTINGS)
    parser.add_argument("--methods", nargs="*", default=["GKD"])
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    for method in options.methods:
        for setting in options.settings:
            for seed in options.seeds:
                runs = json.loads(options.out.read_text()) if options.out.exists() else []
                key = {"seed": seed, "setting": setting, "method": method}
                if any(key.items() <= one.items() for one in runs):
                    continue
                runs.append(run(**key))
                print(json.dumps(runs[-1]), flush=True)
                options.out.write_text(json.dumps(runs, indent=1) + "\n")
    print(table(json.loads(options.out.read_text()) if options.out.exists() else []))


if __name__ == "__main__":
    main()
