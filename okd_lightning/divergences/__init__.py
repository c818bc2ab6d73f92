"""f-divergences between a student p and a teacher q over a vocabulary: pure functions of tensors.

Every divergence is D_f(p, q) = E_{a~p}[f(u)] with u = q(a)/p(a), the teacher over the student, and
is a small frozen object that holds its hyper-parameters. From one f follow the exact loss
(``value``), the advantage of sampled training (``weight``) and the bound (``upper_bound``).

Map, from the interface to its members:

- ``base``: ``Divergence``, the interface and how to write your own.
- ``kl``: ``ForwardKL``, ``ReverseKL`` and their sum, ``Jeffreys``.
- ``jensen_shannon``: ``JensenShannon``, the generalised JSD(beta).
- ``skew``: ``SkewForwardKL`` and ``SkewReverseKL``, KL against a mixture of the two sides.
- ``alpha``: ``AlphaDivergence``, the family that connects both KLs, chi-squared and Hellinger.
- ``chi_squared``: ``PearsonChiSquared`` and ``NeymanChiSquared``.
- ``distances``: ``SquaredHellinger`` and ``TotalVariation``, which come from a metric.
- ``tempered``: ``Tempered``, any of them between distributions of another temperature.
- ``top_k``: ``TopK``, any of them over k ids and a tail: a lower bound.
- ``checking``: ``as_divergence``, an object, class or name, with its f checked.
- ``logprob_pair``: ``LogProbPair`` and ``Summands``, from which value and gradients follow.
- ``log_arithmetic``: numerically safe arithmetic that the others share.

This package imports no models and no Lightning, and has no token masks.
"""

from okd_lightning.divergences.alpha import AlphaDivergence
from okd_lightning.divergences.base import Divergence
from okd_lightning.divergences.checking import as_divergence
from okd_lightning.divergences.chi_squared import NeymanChiSquared, PearsonChiSquared
from okd_lightning.divergences.distances import SquaredHellinger, TotalVariation
from okd_lightning.divergences.jensen_shannon import JensenShannon
from okd_lightning.divergences.kl import ForwardKL, Jeffreys, ReverseKL
from okd_lightning.divergences.logprob_pair import LogProbPair, Summands
from okd_lightning.divergences.skew import SkewForwardKL, SkewReverseKL
from okd_lightning.divergences.tempered import Tempered
from okd_lightning.divergences.top_k import TopK

__all__ = [
    "AlphaDivergence",
    "Divergence",
    "ForwardKL",
    "Jeffreys",
    "JensenShannon",
    "LogProbPair",
    "NeymanChiSquared",
    "PearsonChiSquared",
    "ReverseKL",
    "SkewForwardKL",
    "SkewReverseKL",
    "SquaredHellinger",
    "Summands",
    "Tempered",
    "TopK",
    "TotalVariation",
    "as_divergence",
]
