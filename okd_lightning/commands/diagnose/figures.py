"""Figures of a diagnosis: SVG with the text colour of the surrounding page."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from okd_lightning.commands.diagnose.findings import Diagnosis, EstimatorFinding, Rows
from okd_lightning.commands.diagnose.terminal import AUTHORS

_INK = "#0a0b0c"  # replaced by the page's own text colour
_COLOURS = {"given": "#3b82c4", "student": "#d9702c", "teacher": "#2e9e77"}
_MARKERS = {"given": "o", "student": "s", "teacher": "^"}
_SIZE = (4.4, 3.0)  # inches; wide enough to be read on a phone, where it fills the page
_SETTINGS: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "diagnosis",  # the same ids in every run
    "font.size": 10,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor"), _INK),
    **dict.fromkeys(("xtick.color", "ytick.color", "grid.color"), _INK),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.15,
    "legend.frameon": False,
}


def figures(found: Diagnosis) -> dict[str, str]:
    """Return name → SVG element: places, shares, top_k; bias and noise if measured."""
    with matplotlib.rc_context(_SETTINGS):
        drawn = {
            "places": _places(found.rows),
            "shares": _shares(found.rows),
            "top_k": _top_k(found.rows),
        }
        if found.gradients.estimators:
            drawn["bias"] = _bias(found.gradients.estimators)
            drawn["noise"] = _noise(found.gradients.estimators)
        return {name: _svg(figure, name) for name, figure in drawn.items()}


def _figure(height: float = _SIZE[1]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_SIZE[0], height), layout="constrained")
    return figure, figure.subplots()


def _svg(figure: Figure, name: str) -> str:
    """Return the element alone; its ids get the figure's name, so that several fit on one page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    element = text[text.index("<svg") :].replace(_INK, "currentColor")
    return re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", element)


def _places(rows: Sequence[Rows]) -> Figure:
    figure, axes = _figure()
    for own in rows:
        places = [(bin_.first + bin_.last) / 2 for bin_ in own.bins]
        values = [bin_.reverse_kl for bin_ in own.bins]
        style = {"color": _COLOURS[own.source], "marker": _MARKERS[own.source]}
        axes.plot(places, values, label=AUTHORS[own.source], markersize=4, **style)  # type: ignore[arg-type]
    _log_axis(axes, [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024], rows)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("position in the response (tokens)")
    axes.set_ylabel("reverse KL (nats per token)")
    axes.legend(title="responses", fontsize=9, title_fontsize=9)
    return figure


def _shares(rows: Sequence[Rows]) -> Figure:
    figure, axes = _figure()
    longest = max(rows, key=lambda own: len(own.bins))
    width = 0.8 / len(rows)
    for number, own in enumerate(rows):
        at = [i + (number - (len(rows) - 1) / 2) * width for i in range(len(own.bins))]
        shares = [100 * bin_.share for bin_ in own.bins]
        axes.bar(at, shares, width, color=_COLOURS[own.source], label=AUTHORS[own.source])
    axes.set_xticks(
        range(len(longest.bins)),
        [str(b.first) if b.first == b.last else f"{b.first}–{b.last}" for b in longest.bins],
        rotation=40,
        ha="right",
        fontsize=8,
    )
    axes.grid(axis="x", visible=False)
    axes.set_xlabel("position in the response (tokens)")
    axes.set_ylabel("share of all reverse KL (%)")
    axes.legend(fontsize=9)
    return figure


def _top_k(rows: Sequence[Rows]) -> Figure:
    figure, axes = _figure()
    for own in rows:
        style = {"color": _COLOURS[own.source], "marker": _MARKERS[own.source]}
        masses = [100 * mass.mean for mass in own.top_k.values()]
        axes.plot(list(own.top_k), masses, label=AUTHORS[own.source], markersize=4, **style)  # type: ignore[arg-type]
    axes.set_xscale("log")
    axes.set_xticks(list(rows[0].top_k), [str(k) for k in rows[0].top_k])
    axes.minorticks_off()
    axes.set_ylim(top=102)
    axes.set_xlabel("k")
    axes.set_ylabel("teacher's mass in the\nstudent's top k (%)")
    axes.legend(title="responses", fontsize=9, title_fontsize=9)
    return figure


def _bias(estimators: Sequence[EstimatorFinding]) -> Figure:
    figure, axes = _labelled(estimators)
    for at, row in enumerate(estimators):
        own = row.fidelity
        colour = "#c8403a" if own.is_biased else "#3b82c4"
        error = min(3 * own.along_error, 1e3) if own.along_error == own.along_error else 0.0
        axes.errorbar(own.along_exact, at, xerr=error, fmt="o", color=colour, markersize=5)
    axes.axvline(1, color=_INK, linewidth=0.8)
    values = list(filter(math.isfinite, (row.fidelity.along_exact for row in estimators)))
    axes.set_xlim(min([-0.5, *values]) - 0.3, max([1.5, *values]) + 0.3)
    axes.set_xlabel("mean along the exact gradient\n(1: no bias; bars: 3 standard errors)")
    return figure


def _noise(estimators: Sequence[EstimatorFinding]) -> Figure:
    figure, axes = _labelled(estimators)
    values = [row.fidelity.noise_over_exact for row in estimators]
    axes.barh(range(len(values)), values, color="#3b82c4", height=0.6)
    axes.set_xscale("log")
    for at, value in enumerate(values):
        axes.annotate(
            f"{value:.1f}×",
            (value, at),
            (3, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    axes.set_xlim(right=3 * max(filter(math.isfinite, values), default=1.0))
    axes.set_xlabel("variance over the exact gradient's")
    axes.grid(axis="y", visible=False)
    return figure


def _labelled(estimators: Sequence[EstimatorFinding]) -> tuple[Figure, Axes]:
    """Return axes with one row per estimator, from the top down."""
    figure, axes = _figure(0.9 + 0.22 * len(estimators))
    labels = [f"{row.divergence}, {row.estimator}" for row in estimators]
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.invert_yaxis()
    return figure, axes


def _log_axis(axes: Axes, ticks: Sequence[int], rows: Sequence[Rows]) -> None:
    last = max(own.bins[-1].last for own in rows)
    shown = [tick for tick in ticks if tick <= last]
    axes.set_xscale("log")
    axes.set_xticks(shown, [str(tick) for tick in shown])
    axes.minorticks_off()
