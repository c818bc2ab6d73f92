"""Measures that a comparison shows, their labels, and the direction in which each improves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from okd_lightning.commands.reports.results import RunResult


@dataclass(frozen=True)
class Measure:
    """A metric with its label.

    Attributes:
        name: Name of the metric.
        label: Label in tables and sentences.
        unit: Unit on axes.
        is_gain: Whether higher is better.
    """

    name: str
    label: str
    unit: str = "nats per token"
    is_gain: bool = False


MEASURES = (
    Measure("val/exact_match", "exact match", "share of problems", is_gain=True),
    Measure("val/forward_kl", "forward KL"),
    Measure("val/on_policy_reverse_kl", "on-policy reverse KL"),
    Measure("val/reverse_kl", "reverse KL"),
    Measure("val/agreement", "agreement", "share of tokens", is_gain=True),
)
"""Measures, in the order in which they are shown."""

_BESIDE = (
    Measure("val/on_policy_forward_kl", "on-policy forward KL"),
    Measure("val/top_k_forward_kl", "top-k forward KL"),
    Measure("val/top_k_reverse_kl", "top-k reverse KL"),
    Measure("val/cross_entropy", "cross-entropy"),
)
_FEW = 3
_ROUNDING = 0.01


def shown_measures(results: Sequence[RunResult]) -> list[Measure]:
    """Return the measures that every run has.

    Further measures are added where these are few (prompts alone, a cache). Measures that differed
    before the first step are left out: see ``unlike_measures``.
    """
    common = _common(results) - {measure.name for measure in unlike_measures(results)}
    found = [measure for measure in MEASURES if measure.name in common]
    beside = [measure for measure in _BESIDE if measure.name in common]
    return found + beside[: max(0, _FEW - len(found))]


def unlike_measures(results: Sequence[RunResult]) -> list[Measure]:
    """Return measures on which contenders differ before the first step, despite the same student.

    They differ where a contender changes what is measured: the teacher, its prompt, the rows. Runs
    of one seed are compared; more than 1 % is more than rounding.
    """
    names = _common(results)
    return [m for m in (*MEASURES, *_BESIDE) if m.name in names and _differs(results, m.name)]


def _differs(results: Sequence[RunResult], name: str) -> bool:
    by_seed: dict[int | None, list[float]] = {}
    for result in results:
        by_seed.setdefault(result.seed, []).append(result.before[name])
    return any(
        max(values) - min(values) > _ROUNDING * max(abs(value) for value in values)
        for values in by_seed.values()
        if all(map(math.isfinite, values))
    )


def _common(results: Sequence[RunResult]) -> set[str]:
    return set.intersection(*(set(result.after) & set(result.before) for result in results))
