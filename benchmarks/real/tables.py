"""Tables of the study on a real pair, from results/study.jsonl.

python benchmarks/real/tables.py > benchmarks/real/tables.md
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "study.jsonl"
EQUAL_STEPS = 12
FREE_TUNING = "tuned teacher"
"""Contenders whose fine-tuned teacher exists already."""
MEASURES = {
    "val/cross_entropy": "cross-entropy",
    "val/rouge_l": "ROUGE-L",
    "val/forward_kl": "forward KL to the base",
    "val/reverse_kl": "reverse KL to the base",
    "val/agreement": "agreement",
}
Run = dict[str, Any]


def mean(values: list[float]) -> str:
    """Return the mean, with its standard error where there are several values."""
    if len(values) < 2:
        return f"{values[0]:.3f}" if values else "-"
    error = statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):.3f} ± {error:.3f}"


def table(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def spent_by(run: Run) -> tuple[float, float]:
    """Return a run's steps and CPU seconds, with those of fine-tuning where it paid for it."""
    if run["name"].startswith(FREE_TUNING):
        return run["steps"], run["cpu_seconds"]
    tuning = run.get("tuning_steps", 0), run.get("tuning_cpu_seconds", 0.0)
    return run["steps"] + tuning[0], run["cpu_seconds"] + tuning[1]


def equal_seconds(runs: dict[str, list[Run]]) -> str:
    """Return the measures at the end of every run's budget."""
    rows = []
    for name, own in runs.items():
        done = [spent_by(r) for r in own if "steps" in r]
        cost = [f"{statistics.mean(values):.0f}" for values in zip(*done, strict=True)]
        measures = [mean([r["final"][m] for r in own]) for m in MEASURES]
        rows.append([name, str(len(own)), *(cost or ["0", "0"]), *measures])
    return table(["run", "seeds", "steps", "CPU s", *MEASURES.values()], rows)


def equal_steps(runs: dict[str, list[Run]]) -> str:
    """Return the measures after EQUAL_STEPS steps, and the CPU seconds that they took."""
    names = ["val/cross_entropy", "val/forward_kl", "val/adapted_forward_kl"]
    names += ["val/adapted_teacher_cross_entropy", "val/adapted_teacher_shift"]
    rows = []
    for name, own in runs.items():
        points = [p for r in own for p in r.get("curve", ()) if p["step"] == EQUAL_STEPS]
        if points:
            measures = [mean([p[n] for p in points if n in p]) for n in names]
            seconds = statistics.mean(p["cpu_seconds"] for p in points)
            rows.append([name, f"{seconds:.0f}", *measures])
    header = ["run", "CPU s", "cross-entropy", "forward KL to its fixed teacher"]
    header += ["forward KL to the adapted teacher", "cross-entropy of the adapted teacher"]
    return table([*header, "KL of base to adapted"], rows)


def tuned(runs: dict[str, list[Run]]) -> str:
    """Return the measures of the teachers whose module was fine-tuned first."""
    rows = []
    for name, own in runs.items():
        found = [r for r in own if "tuned_teacher" in r]
        if found:
            measures = [mean([r["tuned_teacher"][m] for r in found]) for m in MEASURES]
            cost = statistics.mean(r["tuning_cpu_seconds"] for r in found)
            rows.append([name, str(found[0]["tuning_steps"]), f"{cost:.0f}", *measures])
    return table(["run", "steps", "CPU s", *MEASURES.values()], rows)


def main() -> None:
    """Print all tables."""
    settings: dict[str, dict[str, list[Run]]] = {}
    lines = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    for run in lines:
        if "rows" in run:
            title = f"{run['student']}, {run['task']}, {run['rows']} rows, {run['budget']:g} CPU s"
            before = [r for r in lines if "rows" not in r and same_pair(r, run)]
            own = settings.setdefault(title, {r["name"]: [r] for r in before})
            own.setdefault(run["name"], []).append(run)
    print("# Tables of the study on a real pair\n\nMade by `tables.py`; nats per token.")
    for title, runs in settings.items():
        print(f"\n## {title}\n\n### At equal CPU seconds\n\n" + equal_seconds(runs))
        print(f"### After {EQUAL_STEPS} steps\n\n" + equal_steps(runs), end="")
        if any("tuned_teacher" in r for own in runs.values() for r in own):
            print("\n### Teachers that were fine-tuned first\n\n" + tuned(runs), end="")


def same_pair(one: Run, other: Run) -> bool:
    """Return whether two runs have one student and one task."""
    return all(one[key] == other[key] for key in ("student", "task"))


if __name__ == "__main__":
    main()
