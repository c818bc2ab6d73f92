"""The slow reference: f-divergences written in u = q/p, as sums, in 50-digit arithmetic.

Imports nothing of the package under test. Numbers are mpmath's, so that neither overflow nor
cancellation needs a trick: what is written here is what a textbook writes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mpmath
from mpmath import exp, inf, log, mpf, sqrt

mpmath.mp.dps = 50

Generator = Callable[[mpf], mpf]


def forward_kl(u):
    return u * log(u)


def reverse_kl(u):
    return -log(u)


def jeffreys(u):
    return (u - 1) * log(u)


def jensen_shannon(beta: float, normalised: bool = False) -> Generator:
    b = mpf(beta)
    scale = 1 / (b * (1 - b)) if normalised else mpf(1)
    return lambda u: scale * (b * u * log(u) - (b * u + 1 - b) * log(b * u + 1 - b))


def alpha_family(alpha: float) -> Generator:
    a = mpf(alpha)
    return lambda u: (u**a - 1 - a * (u - 1)) / (a * (a - 1))


def squared_hellinger(u):
    return (sqrt(u) - 1) ** 2


def pearson(u):
    return (u - 1) ** 2


def neyman(u):
    return (u - 1) ** 2 / u


def total_variation(u):
    return abs(u - 1) / 2


def skew_forward_kl(alpha: float) -> Generator:
    a = mpf(alpha)
    return lambda u: u * log(u / (a * u + 1 - a))


def skew_reverse_kl(alpha: float) -> Generator:
    a = mpf(alpha)
    return lambda u: -log(a + (1 - a) * u)


def triangular(u):
    return (u - 1) ** 2 / (u + 1)


def divergence(f: Generator, student_logprobs: Sequence[float], teacher_logprobs: Sequence[float]):
    """sum_a p f(q/p) of finite log-probabilities."""
    total = mpf(0)
    for log_p, log_q in zip(student_logprobs, teacher_logprobs, strict=True):
        total += exp(mpf(log_p)) * f(exp(mpf(log_q) - mpf(log_p)))
    return total


def divergence_with_zeros(
    f: Generator,
    at_zero: float,
    at_infinity: float,
    student_logprobs: Sequence[float],
    teacher_logprobs: Sequence[float],
):
    """``divergence`` where probabilities may be 0, given f(0) and lim f(u)/u by hand."""
    total = mpf(0)
    for log_p, log_q in zip(student_logprobs, teacher_logprobs, strict=True):
        p, q = exp(mpf(log_p)), exp(mpf(log_q))
        if p > 0 and q > 0:
            total += p * f(q / p)
        elif p > 0:
            total += mpf(at_zero) * p if at_zero < inf else inf
        elif q > 0:
            total += mpf(at_infinity) * q if at_infinity < inf else inf
    return total
