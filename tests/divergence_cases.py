"""The one list of divergences that the whole battery runs over; a new one enters by being listed.

The numbers with each (limits, bound, symmetry) are textbook facts written by hand, not read off
the objects under test.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import divergence_reference as reference
from torch import Tensor

from okd_lightning.divergences import (
    AlphaDivergence,
    Divergence,
    ForwardKL,
    Jeffreys,
    JensenShannon,
    NeymanChiSquared,
    PearsonChiSquared,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    SquaredHellinger,
    TotalVariation,
)

INF, LN2 = math.inf, math.log(2.0)


@dataclass(frozen=True)
class Triangular(Divergence):
    """User's divergence: the subclass in the abstract class's docstring, declared symmetric."""

    def generator(self, log_ratio: Tensor) -> Tensor:
        return log_ratio.expm1() * (log_ratio / 2).tanh()

    @property
    def is_symmetric(self) -> bool:
        return True


@dataclass(frozen=True)
class PlainForwardKL(Divergence):
    """A user's unbounded one, with a generator alone."""

    def generator(self, log_ratio: Tensor) -> Tensor:
        return log_ratio.exp() * log_ratio


@dataclass(frozen=True)
class Case:
    divergence: Divergence
    f: reference.Generator
    at_zero: float
    at_infinity: float
    is_symmetric: bool = False

    @property
    def id(self) -> str:
        return repr(self.divergence)

    @property
    def is_built_in(self) -> bool:
        return type(self.divergence).__module__.startswith("okd_lightning")


def _jsd(beta: float, is_symmetric: bool = False) -> Case:
    at_zero, at_infinity = -(1 - beta) * math.log(1 - beta), -beta * math.log(beta)
    f = reference.jensen_shannon(beta)
    return Case(JensenShannon(beta), f, at_zero, at_infinity, is_symmetric)


def _alpha(alpha: float, at_zero: float, at_infinity: float, is_symmetric: bool = False) -> Case:
    f = reference.alpha_family(alpha)
    return Case(AlphaDivergence(alpha), f, at_zero, at_infinity, is_symmetric)


CASES = [
    Case(ForwardKL(), reference.forward_kl, 0.0, INF),
    Case(ReverseKL(), reference.reverse_kl, INF, 0.0),
    Case(Jeffreys(), reference.jeffreys, INF, INF, is_symmetric=True),
    Case(JensenShannon(0.0), reference.forward_kl, 0.0, INF),
    Case(JensenShannon(1.0), reference.reverse_kl, INF, 0.0),
    _jsd(0.5, is_symmetric=True),
    _jsd(0.25),
    _jsd(0.9999),
    _jsd(0.0001),
    Case(
        JensenShannon(0.5, normalised=True),
        reference.jensen_shannon(0.5, normalised=True),
        2 * LN2,
        2 * LN2,
        is_symmetric=True,
    ),
    _alpha(-1.0, INF, 0.5),
    _alpha(0.3, 1 / 0.3, 1 / 0.7),
    _alpha(0.5, 2.0, 2.0, is_symmetric=True),
    _alpha(0.9, 1 / 0.9, 10.0),
    _alpha(1.5, 1 / 1.5, INF),
    _alpha(2.0, 0.5, INF),
    Case(AlphaDivergence(0.0), lambda u: u - 1 + reference.reverse_kl(u), INF, 1.0),
    Case(AlphaDivergence(1.0), lambda u: 1 - u + reference.forward_kl(u), 1.0, INF),
    _alpha(1e-7, 1e7, 1 / (1 - 1e-7)),
    _alpha(1 - 1e-7, 1 / (1 - 1e-7), 1e7),
    Case(SquaredHellinger(), reference.squared_hellinger, 1.0, 1.0, is_symmetric=True),
    Case(PearsonChiSquared(), reference.pearson, 1.0, INF),
    Case(NeymanChiSquared(), reference.neyman, INF, 1.0),
    Case(TotalVariation(), reference.total_variation, 0.5, 0.5, is_symmetric=True),
    Case(SkewForwardKL(0.1), reference.skew_forward_kl(0.1), 0.0, -math.log(0.1)),
    Case(SkewReverseKL(0.1), reference.skew_reverse_kl(0.1), -math.log(0.1), 0.0),
    Case(SkewForwardKL(1e-9), reference.skew_forward_kl(1e-9), 0.0, -math.log(1e-9)),
    Case(SkewReverseKL(1e-9), reference.skew_reverse_kl(1e-9), -math.log(1e-9), 0.0),
    Case(Triangular(), reference.triangular, 1.0, 1.0, is_symmetric=True),
    Case(PlainForwardKL(), reference.forward_kl, 0.0, INF),
]
