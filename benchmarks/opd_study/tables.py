"""Tables of finished runs for the terminal."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from opd_study.arms import Arm

_COLUMNS = {
    "on-policy rev KL": "on_policy_reverse_kl",
    "on-policy fwd KL": "on_policy_forward_kl",
    "on-policy JSD": "on_policy_jsd",
    "fwd KL": "forward_kl",
    "agree": "agreement",
    "exact": "exact_match",
}


def last(run: Mapping[str, Any]) -> dict[str, float]:
    """Return the last measured point of a run; empty where it stopped before one."""
    curve = run["curve"]
    return curve[max(curve, key=int)] if curve else {}


def runs_table(title: str, runs: Mapping[str, Any], arms: Sequence[Arm]) -> Table:
    """Return means over seeds at the end of the runs, with every seed's first column."""
    shown = Table(title=title)
    for name in ("setting", "method", *_COLUMNS, "seeds", "CPU s"):
        shown.add_column(name, no_wrap=True)
    groups: dict[tuple[str, str], list[Any]] = {}
    for arm in arms:
        if arm.key in runs:
            groups.setdefault((arm.setting, arm.name), []).append(runs[arm.key])
    for (setting, name), found in groups.items():
        points = [last(run) for run in found]
        cells = [_mean(points, key) for key in _COLUMNS.values()]
        main = "exact_match" if cells[-1] else "on_policy_reverse_kl"
        seeds = " ".join("stopped" if "stopped" in r else f"{last(r)[main]:.3f}" for r in found)
        seconds = statistics.mean(run["cpu_seconds"] for run in found)
        shown.add_row(setting, name, *cells, seeds, f"{seconds:.0f}")
    return shown


def variance_table(title: str, measured: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return a table with one row per estimator."""
    shown = Table(title=title)
    columns = ("along_exact", "along_exact_error", "cosine", "cosine_error", "variance")
    for name in ("divergence", "credit", *columns):
        shown.add_column(name, no_wrap=True)
    for divergence, rows in measured.items():
        for label, row in rows.items():
            cells = ("" if row[name] is None else f"{row[name]:.3g}" for name in columns)
            shown.add_row(divergence, label, *cells)
    return shown


def _mean(points: Sequence[Mapping[str, float]], key: str) -> str:
    values = [point[key] for point in points if key in point]
    return f"{statistics.mean(values):.3f}" if values else ""
