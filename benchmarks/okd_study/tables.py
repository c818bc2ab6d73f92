"""Tables of the study: means over seeds, one row per method."""

from __future__ import annotations

import statistics

from rich.table import Table

from okd_study.arms import Arm

COLUMNS = {
    "fwd KL": "val/forward_kl",
    "rev KL": "val/reverse_kl",
    "on-policy rev KL": "val/on_policy_reverse_kl",
    "CE": "val/cross_entropy",
    "agree": "val/agreement",
    "ExAccErr %": "val/excess_accumulated_error",
    "ROUGE-L": "val/rouge_l",
    "exact": "val/exact_match",
    "base CE": "val/teacher_cross_entropy",
    "teacher CE": "val/adapted_teacher_cross_entropy",
    "CPU s": "cpu_seconds",
}


def table(title: str, results: dict[str, dict[str, float]], arms: list[Arm]) -> Table:
    """Return a table of the finished runs among ``arms``."""
    shown = Table(title=title, expand=False)
    for name in ("conditions", "method", "steps", "seeds", *COLUMNS):
        shown.add_column(name, no_wrap=True)
    groups: dict[tuple[str, str, int], list[dict[str, float]]] = {}
    for arm in arms:
        if arm.key in results:
            row = (str(arm.conditions), arm.name, arm.steps)
            groups.setdefault(row, []).append(results[arm.key])
    for (conditions, name, steps), runs in groups.items():
        cells = [_mean(runs, key) for key in COLUMNS.values()]
        shown.add_row(conditions, name, str(steps), str(len(runs)), *cells)
    return shown


def line(arm: Arm, measured: dict[str, float]) -> str:
    """Return a finished run's measures as a line."""
    values = {label: measured[key] for label, key in COLUMNS.items() if key in measured}
    return f"{arm.key} {values}"


def _mean(runs: list[dict[str, float]], key: str) -> str:
    values = [run[key] for run in runs if key in run]
    return f"{statistics.mean(values):.3f}" if values else ""
