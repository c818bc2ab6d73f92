"""Plots of quality over optimizer steps, one line per run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from okd_lightning.commands.reports.measures import shown_measures
from okd_lightning.commands.reports.results import RunResult
from okd_lightning.commands.reports.spread import Spread, methods_of

_LABELS = {
    "val/exact_match": "exact match (share of problems)",
    "val/forward_kl": "forward KL to the teacher (nats per token)",
    "val/reverse_kl": "reverse KL to the teacher (nats per token)",
}


_MOST_ROWS = 3
_COSTS = {
    "seconds": "seconds of training and rollouts",
    "cpu_seconds": "CPU seconds of training and rollouts",
    "tokens": "loss tokens trained on",
}
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555555")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def plot_curves(
    path: Path,
    results: Sequence[RunResult],
    metrics: Sequence[str] = ("val/exact_match", "val/forward_kl"),
    title: str | None = None,
) -> None:
    """Write a PNG with one panel per metric.

    Args:
        path: The PNG file.
        results: The runs; each is a line from its ``before`` to its ``after``.
        metrics: Names of metrics that all runs have.
        title: Above the panels.
    """
    figure = Figure(figsize=(5.2 * len(metrics), 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, name in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True):
        for result in results:
            points = [(step, values[name]) for step, values in result.curve if name in values]
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=result.method)
        axes.set_xlabel("optimizer steps")
        axes.set_ylabel(_LABELS.get(name, name))
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    if title:
        figure.suptitle(title)
    figure.savefig(path, dpi=130)


def plot_comparison(
    path: Path,
    results: Sequence[RunResult],
    title: str | None = None,
    clock: Literal["seconds", "cpu_seconds"] = "seconds",
) -> None:
    """Write a PNG: a row of panels per measure, over time and tokens, one line per method.

    A line is the mean over seeds of the validations that all seeds of a method have; its band is
    the standard error of that mean.

    Args:
        path: The PNG file.
        results: At least one run.
        title: Above the panels.
        clock: The time of the left panels: that of the clock, or CPU time.
    """
    costs = (clock, "tokens")
    measures = shown_measures(results)[:_MOST_ROWS]
    methods = methods_of(results)
    size = (9.6, 0.9 + 2.7 * len(measures))
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(measures), len(costs), squeeze=False, sharey="row", sharex="col")
    for row, measure in zip(panels, measures, strict=True):
        for axes, cost in zip(row, costs, strict=True):
            for number, method in enumerate(methods):
                own = [result for result in results if result.method == method]
                _draw_band(axes, own, measure.name, cost, method, number)
            axes.grid(alpha=0.25, linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
            if measure is measures[-1]:
                axes.set_xlabel(_COSTS[cost])
        row[0].set_ylabel(f"{measure.label}\n({measure.unit})")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(len(labels), 5), frameon=False
    )
    if title:
        figure.suptitle(title)
    figure.savefig(path, dpi=130)


def _draw_band(
    axes: Axes, runs: Sequence[RunResult], metric: str, cost: str, method: str, number: int
) -> None:
    """Draw one method's mean over seeds, point by point, with its standard error."""
    colour, marker = _COLOURS[number % len(_COLOURS)], _MARKERS[number % len(_MARKERS)]
    num = min(len(run.points) for run in runs)
    columns = [[run.points[i] for run in runs] for i in (*range(num - 1), -1)]
    x = [Spread.of([getattr(point, cost) for point in column]).mean for column in columns]
    y = [Spread.of([point.metrics[metric] for point in column]) for column in columns]
    means = [spread.mean for spread in y]
    axes.plot(x, means, color=colour, marker=marker, markersize=4, linewidth=1.6, label=method)
    if len(runs) > 1:
        low = [spread.mean - spread.error for spread in y]
        high = [spread.mean + spread.error for spread in y]
        axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
