"""Plot of on-policy divergence over optimizer steps, by method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from opd_study.arms import DIVERGENCES, FORWARD, REVERSE, Arm, gkd, opd, opd_plus

_METRIC = "on_policy_reverse_kl"
_SEEDS = (0, 1, 2)
_TICKS = (0.8, 1, 2, 5, 10, 20)


def draw(
    path: Path, starts: Mapping[str, Any], runs: Mapping[str, Any], normalization: str
) -> None:
    """Draw a panel per divergence, a line per seed, as far as each has run with this divisor."""
    figure = Figure(figsize=(12.5, 3.9), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(DIVERGENCES), sharey=True)
    for axes, divergence in zip(panels, DIVERGENCES, strict=True):
        for arm, colour, style in _lines(divergence):
            own = replace(arm, normalization=normalization)
            _plot(axes, own, colour, style, starts, runs)
        axes.set_title(divergence)
        axes.set_yscale("log")
        axes.set_yticks(_TICKS, labels=map(str, _TICKS))
        axes.set_yticks((), minor=True)
        axes.set_xlabel("optimizer steps of 16 rollouts, rate 1e-3")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
    panels[0].set_ylabel("reverse KL on own stories (nats per token)")
    figure.savefig(path, dpi=130)


def _lines(divergence: str) -> list[tuple[Arm, str, str]]:
    lines = [
        (opd(divergence), "tab:red", "-"),
        (opd(divergence, 6.0), "tab:red", ":"),
        (gkd(divergence), "tab:green", "-"),
    ]
    if divergence != FORWARD:
        lines.insert(2, (opd_plus(divergence, "value_baseline"), "tab:blue", "-"))
    if divergence != REVERSE:
        lines.insert(2, (opd_plus(divergence), "tab:purple", "-"))
    if divergence == FORWARD:
        lines.insert(3, (opd_plus(divergence, clip=6.0), "tab:purple", ":"))
    return lines


def _plot(
    axes: Axes,
    arm: Arm,
    colour: str,
    style: str,
    starts: Mapping[str, Any],
    runs: Mapping[str, Any],
) -> None:
    label: str | None = arm.name.replace(f" {arm.name.split()[1].rstrip(',')}", "", 1)
    for seed in _SEEDS:
        longest = (replace(arm, seed=seed, steps=steps).key for steps in (200, 100))
        run = next((runs[key] for key in longest if key in runs), None)
        if run is None:
            continue
        points = [(0, starts[replace(arm, seed=seed).start_key][_METRIC])]
        points += [(int(step), values[_METRIC]) for step, values in run["curve"].items()]
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, style, color=colour, linewidth=1.2, label=label)
        label = None
