"""Pictures: quality over optimizer steps, one line a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from okd_lightning.reports.results import RunResult

_LABELS = {
    "val/exact_match": "exact match (share of problems)",
    "val/forward_kl": "forward KL to the teacher (nats a token)",
    "val/reverse_kl": "reverse KL to the teacher (nats a token)",
}


def plot_curves(
    path: Path,
    results: Sequence[RunResult],
    metrics: Sequence[str] = ("val/exact_match", "val/forward_kl"),
    title: str | None = None,
) -> None:
    """Write a PNG with one panel a metric.

    Args:
        path: Where to write.
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
