"""Accepted forms of a method's divergence, and the check of its f.

Frozen here: an object, a class and a class's name are the same; an f that is not convex, not 0 at
u = 1, not finite, or no differentiable Tensor of the same shape is refused where a method or a
wrapper is made; every shipped f passes, also where it has a kink or grows fast.
"""

from __future__ import annotations

import pytest
import torch

from okd_lightning import GKD, KD, OKD, OPD, OPDPlus
from okd_lightning.divergences import (
    AlphaDivergence,
    Divergence,
    ForwardKL,
    JensenShannon,
    NeymanChiSquared,
    PearsonChiSquared,
    ReverseKL,
    SkewForwardKL,
    Tempered,
    TopK,
    TotalVariation,
)
from okd_lightning.divergences.checking import check_f
from okd_lightning.errors import ConfigError
from okd_lightning.losses import ExactDivergence


def made(generator) -> Divergence:
    kind = type("Own", (Divergence,), {"generator": lambda self, x: generator(x)})
    return kind()


@pytest.mark.parametrize(
    "divergence",
    [
        TotalVariation(),
        AlphaDivergence(-10.0),
        AlphaDivergence(10.0),
        JensenShannon(0.0),
        JensenShannon(1e-3),
        PearsonChiSquared(),
        NeymanChiSquared(),
        SkewForwardKL(1e-4),
        Tempered(ForwardKL(), 7.0),
        made(lambda x: x.float().exp() * x.float() - x.float().exp() + 1),
    ],
)
def test_a_convex_f_passes(divergence):
    check_f(divergence)


@pytest.mark.parametrize(
    ("generator", "words"),
    [
        (lambda x: -x.expm1() * (x / 2).tanh(), "f is not convex.*is its sign right"),
        (lambda x: x.exp() * x + 1, r"f\(1\) = 1"),
        (lambda x: 1 / x, "f is not finite at log-ratio 0 nats"),
        (lambda x: 0.0, "generator returned a float"),
        (lambda x: (x.exp() * x).sum(), r"of shape \[\] for log-ratios of shape \[5, 13\]"),
        (lambda x: (x.exp() * x).detach(), "has no gradient in log_ratio"),
        (lambda x: x.round().long(), "torch.int64"),
    ],
)
@pytest.mark.parametrize(
    "make",
    [
        lambda d: KD(divergence=d),
        lambda d: GKD(divergence=d),
        lambda d: OKD(teacher_divergence=d),
        lambda d: OPD(d),
        lambda d: OPDPlus(type(d)),
        lambda d: Tempered(d, 2.0),
        lambda d: TopK(d, 3),
        lambda d: ExactDivergence(d),
    ],
)
def test_what_is_no_f_is_refused_at_construction(make, generator, words):
    with pytest.raises(ConfigError, match=words):
        make(made(generator))


@pytest.mark.parametrize("given", [ReverseKL(), ReverseKL, "ReverseKL"])
def test_an_object_a_class_and_a_name_are_the_same(given):
    assert KD(divergence=given).divergence == ReverseKL()
    assert OPD(given).advantage.divergence == ReverseKL()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("reverse_kl", "expected a Divergence object, or the name of one: did you mean ReverseKL"),
        ("", "known are AlphaDivergence"),
        (Divergence, "is the abstract class Divergence"),
        (torch.nn.KLDivLoss(), r"is KLDivLoss\(\); expected a Divergence object"),
    ],
)
def test_other_things_are_refused_with_a_hint(given, words):
    with pytest.raises(ConfigError, match=words):
        KD(divergence=given)
