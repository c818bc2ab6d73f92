"""Means over seeds with their standard errors, and when one contender is better than another."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from okd_lightning.reports.results import RunResult

_T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
_NORMAL_95 = 1.96


@dataclass(frozen=True)
class Spread:
    """A mean over runs.

    Attributes:
        mean: Of the values.
        error: Its standard error; NaN for a single value, of which nothing can be said.
        count: Values.
    """

    mean: float
    error: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Mean and standard error of at least one value."""
        num = len(values)
        error = statistics.stdev(values) / math.sqrt(num) if num > 1 else math.nan
        return cls(statistics.fmean(values), error, num)

    @property
    def is_beyond_chance(self) -> bool:
        """Whether the mean is off zero by more than Student's t allows at 95 %.

        The factor on the standard error is 12.7 with two values, 4.3 with three, 2.8 with five.
        """
        if self.count < 2:
            return False
        freedom = self.count - 1
        factor = _T_95[freedom - 1] if freedom <= len(_T_95) else _NORMAL_95
        return abs(self.mean) > factor * self.error

    def text(self) -> str:
        """``0.653±0.012``, or the mean alone; two digits from 10 on."""
        digits = 3 if abs(self.mean) < 10 else 2
        mean = f"{self.mean:.{digits}f}"
        return mean if math.isnan(self.error) else f"{mean}±{self.error:.{digits}f}"


def methods_of(results: Sequence[RunResult]) -> list[str]:
    """The contenders, in the order of their first runs."""
    return list(dict.fromkeys(result.method for result in results))


def after_by_seed(
    results: Sequence[RunResult], method: str, metric: str
) -> dict[int | None, float]:
    """Seed → what a contender's runs came to."""
    own = (result for result in results if result.method == method)
    return {result.seed: result.after[metric] for result in own if metric in result.after}


def difference(results: Sequence[RunResult], one: str, other: str, metric: str) -> Spread | None:
    """``one`` minus ``other``, paired by seed; None where no seed has both."""
    first, second = after_by_seed(results, one, metric), after_by_seed(results, other, metric)
    both = [first[seed] - second[seed] for seed in first if seed in second]
    return Spread.of(both) if both else None
