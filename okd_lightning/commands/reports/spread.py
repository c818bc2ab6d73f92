"""Means over seeds with their standard errors, and significance of differences."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from okd_lightning.commands.reports.results import RunResult

# fmt: off
# two-sided 95 % quantiles of Student's t, for 1 to 30 degrees of freedom
_T_95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)
# fmt: on
_Z_95 = 1.95996


@dataclass(frozen=True)
class Spread:
    """A mean over runs.

    Attributes:
        mean: Mean of the values.
        error: Standard error of the mean; NaN for a single value.
        count: Number of values.
    """

    mean: float
    error: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return mean and standard error of the values; error NaN where one is not finite."""
        num = len(values)
        if not all(map(math.isfinite, values)):
            return cls(math.fsum(values) / num, math.nan, num)
        error = statistics.stdev(values) / math.sqrt(num) if num > 1 else math.nan
        return cls(statistics.fmean(values), error, num)

    @property
    def is_beyond_chance(self) -> bool:
        """True where the mean differs from zero by more than Student's t allows at 95 %.

        The factor on the standard error is 12.7 with two values, 4.3 with three, 2.8 with five.
        Values that are all equal are not beyond chance: their error is 0.
        """
        if not self.error > 0:
            return False
        freedom = self.count - 1
        # first terms of the expansion of t's quantile in 1 / freedom
        beyond = _Z_95 + (_Z_95**3 + _Z_95) / (4 * freedom)
        factor = _T_95[freedom - 1] if freedom <= len(_T_95) else beyond
        return abs(self.mean) > factor * self.error

    def text(self) -> str:
        """Format as ``0.653±0.012``, or the mean alone; two digits from 10 on."""
        digits = 3 if abs(self.mean) < 10 else 2
        mean = f"{self.mean:.{digits}f}"
        return mean if math.isnan(self.error) else f"{mean}±{self.error:.{digits}f}"


def methods_of(results: Sequence[RunResult]) -> list[str]:
    """Return the contenders, in the order of their first runs."""
    return list(dict.fromkeys(result.method for result in results))


def after_by_seed(
    results: Sequence[RunResult], method: str, metric: str
) -> dict[int | None, float]:
    """Return seed → final value of a contender's runs."""
    own = (result for result in results if result.method == method)
    return {result.seed: result.after[metric] for result in own if metric in result.after}


def difference(results: Sequence[RunResult], one: str, other: str, metric: str) -> Spread | None:
    """Return ``one`` minus ``other``, paired by seed; None where no seed has both."""
    first, second = after_by_seed(results, one, metric), after_by_seed(results, other, metric)
    both = [first[seed] - second[seed] for seed in first if seed in second]
    return Spread.of(both) if both else None
