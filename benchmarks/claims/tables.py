"""Make the study's tables and plot from ``results/``: writes ``tables.md`` and ``claims.png``.

python benchmarks/claims/tables.py [--results FOLDER]
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from okd_lightning.commands.reports.results import Point, RunResult
from okd_lightning.commands.reports.spread import Spread, methods_of

HERE = Path(__file__).parent
_COLUMNS = {
    "exact match": "val/exact_match",
    "forward KL": "val/forward_kl",
    "reverse KL": "val/reverse_kl",
    "on-policy reverse KL": "val/on_policy_reverse_kl",
    "agreement": "val/agreement",
}
_TITLES = {
    "few": "Arithmetic, 400 problems read 64 times (400 steps of 64)",
    "many": "Arithmetic, 25,600 problems read once (400 steps of 64)",
    "tinystories": "TinyStories, 1.5 passes (200 steps of 16)",
    "policy_gradient": "TinyStories, small steps of many rollouts (80 steps of 64, rate 3e-4)",
    "opsd": "Arithmetic, a student that can read a solution (400 steps of 64)",
}
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555555", "#8b4513")
_GIVEN = ("SFT", "KD", "reverse_kd", "OKD", "MiniLLM", "gkd_lambda1_beta0", "gkd_lambda1_beta1")
_SAMPLED = (
    "opd_reverse",
    "opd_forward",
    "opd_jsd",
    "opdplus_reverse",
    "opdplus_forward",
    "opdplus_jsd",
    "opdplus_value_reverse",
)


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--results", type=Path, default=HERE / "results")
    folder: Path = parser.parse_args().results
    found = {name: read(folder / name) for name in _TITLES if (folder / name).is_dir()}
    lines = ["<!-- written by benchmarks/claims/tables.py -->"]
    for name, results in found.items():
        lines += ["", f"## {_TITLES[name]}", "", *table(results)]
        lines += ["", *grid(results)] if _is_grid(results) else []
    (HERE / "tables.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    picture(HERE / "claims.png", found)


def read(folder: Path) -> list[RunResult]:
    """Return a comparison's runs with their curves."""
    records = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [RunResult.from_record(r, [p.to_record() for p in _curve(r, rows)]) for r in records]


def _curve(record: dict[str, object], rows: Sequence[dict[str, str]]) -> list[Point]:
    key = (str(record["method"]), str(record["seed"]))
    return [
        Point(
            step=int(row["step"]),
            tokens=int(row["tokens"]),
            seconds=float(row["seconds"]),
            metrics={n: float(v) for n, v in row.items() if n.startswith("val/") and v},
            cpu_seconds=float(row["cpu_seconds"]),
        )
        for row in rows
        if (row["method"], row["seed"]) == key and row["step"] != "0"
    ]


def table(results: Sequence[RunResult]) -> list[str]:
    """Return Markdown: a line per contender, mean ± standard error over its seeds."""
    columns = {h: n for h, n in _COLUMNS.items() if any(n in r.after for r in results)}
    lines = [
        f"| method | seeds | {' | '.join(columns)} | CPU s |",
        "|---" * (len(columns) + 3) + "|",
    ]
    before = results[0].before
    cells = [f"{before[name]:.3f}" if name in before else "" for name in columns.values()]
    lines.append(f"| *before* | | {' | '.join(cells)} | |")
    for method in methods_of(results):
        runs = [result for result in results if result.method == method]
        cells = [
            Spread.of([run.after[name] for run in runs]).text() if name in runs[0].after else ""
            for name in columns.values()
        ]
        seconds = Spread.of([run.cpu_seconds for run in runs]).mean
        lines.append(f"| {method} | {len(runs)} | {' | '.join(cells)} | {seconds:.0f} |")
    return lines


def _is_grid(results: Sequence[RunResult]) -> bool:
    return "gkd_lambda0.5_beta0.5" in methods_of(results)


def grid(results: Sequence[RunResult]) -> list[str]:
    """Return Markdown: λ × β, dataset forward KL / on-policy reverse KL [/ exact match]."""
    names = ["val/forward_kl", "val/on_policy_reverse_kl", "val/exact_match"]
    names = [name for name in names if name in results[0].after]
    heads = " / ".join(name.removeprefix("val/") for name in names)
    lines = [
        f"{heads}:",
        "",
        "| λ \\ β | 0 (forward KL) | 0.5 | 1 (reverse KL) |",
        "|---" * 4 + "|",
    ]
    for share in ("0", "0.5", "1"):
        cells = []
        for beta in ("0", "0.5", "1"):
            own = f"gkd_lambda{share}_beta{beta}"
            method = {"gkd_lambda0_beta0": "KD", "gkd_lambda0_beta1": "reverse_kd"}.get(own, own)
            runs = [r for r in results if r.method == method]
            means = (Spread.of([r.after[name] for r in runs]).mean for name in names)
            cells.append(" / ".join(f"{mean:.3f}" for mean in means) if runs else "")
        lines.append(f"| {share} | {' | '.join(cells)} |")
    return lines


@dataclass(frozen=True)
class _Panel:
    """Curves of one panel of the plot."""

    table: str
    measure: str
    title: str
    methods: Sequence[str] = _GIVEN
    cost: Literal["cpu_seconds", "step"] = "cpu_seconds"


_PANELS = (
    _Panel("few", "val/exact_match", "exact match, few rows"),
    _Panel("many", "val/exact_match", "exact match, many rows"),
    _Panel("tinystories", "val/forward_kl", "forward KL, TinyStories"),
    _Panel(
        "policy_gradient",
        "val/on_policy_reverse_kl",
        "on-policy reverse KL, TinyStories",
        (*_SAMPLED, "gkd_lambda1_beta1"),
        "step",
    ),
)
_AXES = {"cpu_seconds": "CPU seconds", "step": "optimizer steps"}


def picture(path: Path, found: dict[str, list[RunResult]]) -> None:
    """Draw four panels: quality over CPU seconds on three tasks, and OPD with OPD+ over steps."""
    panels = [panel for panel in _PANELS if panel.table in found]
    figure = Figure(figsize=(11, 4.2 * ((len(panels) + 1) // 2)), layout="constrained")
    # -(-a // b) rounds up
    for axes, panel in zip(figure.subplots(-(-len(panels) // 2), 2).flat, panels, strict=False):
        _draw(axes, panel, found[panel.table])
    figure.savefig(path, dpi=110)


def _draw(axes: Axes, panel: _Panel, results: Sequence[RunResult]) -> None:
    shown = [method for method in panel.methods if method in methods_of(results)]
    for i, method in enumerate(shown):
        runs = [result.points for result in results if result.method == method]
        places = list(zip(*runs, strict=False))
        x = [sum(getattr(p, panel.cost) for p in points) / len(points) for points in places]
        y = [sum(p.metrics[panel.measure] for p in points) / len(points) for points in places]
        dashes = "--" if method.startswith("opd_") else "-"
        axes.plot(x, y, dashes, color=_COLOURS[i % len(_COLOURS)], marker="o", ms=3, label=method)
    axes.set(title=panel.title, xlabel=_AXES[panel.cost])
    if panel.table == "policy_gradient":
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=7)


if __name__ == "__main__":
    main()
