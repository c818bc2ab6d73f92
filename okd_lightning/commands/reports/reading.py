"""One sentence about a comparison: the best method on each measure, if there is one."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

from okd_lightning.commands.reports.measures import Measure, shown_measures, unlike_measures
from okd_lightning.commands.reports.results import RunResult
from okd_lightning.commands.reports.spread import Spread, after_by_seed, difference, methods_of


def reading(results: Sequence[RunResult]) -> str:
    """Return a sentence that the numbers support.

    A method is called best on a measure where it beats every other one by a difference, paired by
    seed, that chance would exceed in fewer than 5 of 100 cases (Student's t over the seeds).

    Args:
        results: Results of at least one run.
    """
    methods, measures = methods_of(results), shown_measures(results)
    if len(methods) < 2:
        return f"Only {methods[0]} was run: there is nothing to compare it with."
    if not measures:
        return "The runs share no measure that could be compared."
    if all(_pairs(results, measure, methods) < 2 for measure in measures):
        return (
            "One seed says nothing about chance, so no method is called better; give --seeds 0,1,2 "
            "or more."
        )
    winners: dict[str, list[str]] = defaultdict(list)
    open_ones = []
    for measure in measures:
        best, margin = _best(results, measure, methods)
        if margin is not None:
            winners[best].append(
                f"{measure.label} (by {abs(margin.mean):.3f} ± {margin.error:.3f})"
            )
        else:
            open_ones.append(measure.label)
    parts = [f"{method} is best on {_listed(labels)}" for method, labels in winners.items()]
    if open_ones:
        parts.append(f"on {_listed(open_ones)} no method is better by more than chance")
    unlike = [measure.label for measure in unlike_measures(results)]
    if unlike:
        parts.append(
            f"{_listed(unlike)} differed before the first step: contenders measure different "
            "things there and are not compared"
        )
    sentence = "; ".join(parts)
    return f"{sentence[0].upper()}{sentence[1:]}."


def _best(
    results: Sequence[RunResult], measure: Measure, methods: Sequence[str]
) -> tuple[str, Spread | None]:
    """Return the best method, and its smallest margin if every other one is worse beyond chance."""
    sign = 1 if measure.is_gain else -1
    means = {
        method: Spread.of(list(values.values())).mean
        for method in methods
        if (values := after_by_seed(results, method, measure.name))
    }
    best = max(means, key=lambda method: _rank(sign * means[method]))
    margins = [difference(results, best, other, measure.name) for other in means if other != best]
    is_clear = all(m is not None and m.mean * sign > 0 and m.is_beyond_chance for m in margins)
    clear = [margin for margin in margins if margin is not None]
    return best, min(clear, key=lambda m: abs(m.mean)) if is_clear and clear else None


def _rank(value: float) -> float:
    return -math.inf if math.isnan(value) else value


def _pairs(results: Sequence[RunResult], measure: Measure, methods: Sequence[str]) -> int:
    """Return the number of seeds that all methods have run with."""
    seeds = [set(after_by_seed(results, method, measure.name)) for method in methods]
    return len(set.intersection(*seeds))


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
