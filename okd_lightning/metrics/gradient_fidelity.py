"""Fidelity of an estimated gradient: its bias against the exact one, and its noise.

Owns the arithmetic on gradients of several batches; knows no model. Products of means are taken
over pairs of different batches, so that the noise of one batch is not multiplied with itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

_Totals = Mapping[str, float]


@dataclass(frozen=True)
class GradientFidelity:
    """Comparison of a gradient estimator with the exact gradient, over several batches.

    Attributes:
        along_exact: The mean's component along the exact mean, divided by the latter's norm: 1
            without bias, below 0 for the opposite direction.
        along_error: Standard error of ``along_exact`` (jackknife over batches); NaN below three.
        cosine: Between both means; NaN where noise hides a mean.
        cosine_error: Standard error of ``cosine``.
        noise: Trace of the covariance of one batch's gradient over the exact mean's squared norm:
            at 100, a batch's noise is ten times as long as the exact mean.
        noise_over_exact: Variance over that of the exact gradient.
        batches: Number of batches.
    """

    along_exact: float
    along_error: float
    cosine: float
    cosine_error: float
    noise: float
    noise_over_exact: float
    batches: int

    @property
    def signal_to_noise(self) -> float:
        """The length of the exact mean over that of one batch's noise; NaN without a mean."""
        return 1 / math.sqrt(self.noise) if self.noise > 0 else math.nan

    @property
    def is_biased(self) -> bool:
        """True where ``along_exact`` differs from 1 by more than three standard errors."""
        return abs(self.along_exact - 1) > 3 * self.along_error


class GradientProducts:
    """Inner products of mean gradients, and standard errors of their ratios.

    Args:
        own: [batches, parameters] of the estimator, at least two batches.
        exact: [batches, parameters] of the exact loss on the same rollouts.
    """

    def __init__(self, own: Tensor, exact: Tensor) -> None:
        pairs = {"own": (own, own), "mixed": (own, exact), "exact": (exact, exact)}
        self._grams = {name: (a @ b.T).double() for name, (a, b) in pairs.items()}
        for gram in self._grams.values():
            gram.fill_diagonal_(0.0)  # pairs of different batches only

    def jackknife(self, ratio: Callable[[_Totals], float]) -> tuple[float, float]:
        """Return a ratio of products and its standard error, by leaving out one batch at a time."""
        totals = {name: float(gram.sum()) for name, gram in self._grams.items()}
        num = len(self._grams["own"])
        if num < 3:
            return ratio(totals), math.nan
        without = []
        for batch in range(num):
            left = {
                name: totals[name] - float(gram[batch].sum() + gram[:, batch].sum())
                for name, gram in self._grams.items()
            }
            without.append(ratio(left))
        mean = sum(without) / num
        spread = sum((value - mean) ** 2 for value in without) * (num - 1) / num
        return ratio(totals), math.sqrt(spread)

    @property
    def exact_square(self) -> float:
        """Squared norm of the exact mean; can be below 0 where noise hides it."""
        num = len(self._grams["exact"])
        return float(self._grams["exact"].sum()) / (num * (num - 1))


def variance_trace(gradients: Tensor) -> float:
    """Return the trace of the covariance of one batch's gradient, from [batches, parameters]."""
    return float(gradients.var(0).sum())


def gradient_fidelity(own: Tensor, exact: Tensor) -> GradientFidelity:
    """Return bias and noise of an estimator.

    Given the prefixes, the exact gradient is the expectation of an unbiased sampled one, so both
    have to be taken on the same rollouts and divided by the same number.

    Args:
        own: [batches, parameters], at least two batches, no gradient.
        exact: [batches, parameters] of the exact loss.
    """
    products = GradientProducts(own, exact)
    along, along_error = products.jackknife(_along)
    cosine, cosine_error = products.jackknife(_cosine)
    square, noise = products.exact_square, variance_trace(own)
    exact_noise = variance_trace(exact)
    return GradientFidelity(
        along_exact=along,
        along_error=along_error,
        cosine=cosine,
        cosine_error=cosine_error,
        noise=noise / square if square > 0 else math.nan,
        noise_over_exact=noise / exact_noise if exact_noise > 0 else math.nan,
        batches=len(own),
    )


def _along(products: _Totals) -> float:
    return products["mixed"] / products["exact"] if products["exact"] else math.nan


def _cosine(products: _Totals) -> float:
    if products["own"] <= 0 or products["exact"] <= 0:
        return math.nan  # noise hides a mean
    return products["mixed"] / math.sqrt(products["own"] * products["exact"])
