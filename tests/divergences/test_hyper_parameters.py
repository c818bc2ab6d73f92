"""Hyper-parameters of divergences.

Frozen here: values out of range are refused with one line that says what, got and expected;
divergences are comparable and hashable; the command line builds them by class name; JSD(beta)'s
ends and the normalised limits; the alpha-family's named members; skew KL's limits.
"""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError

import pytest
import torch
from jsonargparse import ArgumentParser

from okd_lightning.divergences import (
    AlphaDivergence,
    Divergence,
    ForwardKL,
    JensenShannon,
    NeymanChiSquared,
    PearsonChiSquared,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    SquaredHellinger,
    Tempered,
)
from okd_lightning.errors import ConfigError

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: JensenShannon(-0.1), r"JensenShannon: beta is -0\.1, expected .*\[0, 1\]"),
        (lambda: JensenShannon(1.5), r"beta is 1\.5"),
        (lambda: JensenShannon(NAN), r"beta is nan"),
        (lambda: SkewForwardKL(0.0), r"SkewForwardKL: alpha is 0\.0, expected .*ForwardKL"),
        (lambda: SkewReverseKL(1.0), r"SkewReverseKL: alpha is 1\.0, expected .*ReverseKL"),
        (lambda: AlphaDivergence(INF), r"AlphaDivergence: alpha is inf, expected a finite"),
        (lambda: AlphaDivergence(NAN), r"alpha is nan"),
        (lambda: Tempered(ForwardKL(), 0.0), r"Tempered: temperature is 0\.0, expected a positive"),
        (lambda: Tempered(ForwardKL(), -1.0), r"temperature is -1\.0"),
        (lambda: Tempered(ForwardKL(), NAN), r"temperature is nan"),
        (lambda: Tempered(ForwardKL(), INF), r"temperature is inf"),
    ],
)
def test_out_of_range_is_refused_in_one_line(build, said):
    with pytest.raises(ConfigError, match=said) as caught:
        build()
    assert "\n" not in str(caught.value)


def test_divergences_are_values():
    assert JensenShannon(0.25) == JensenShannon(0.25) != JensenShannon(0.5)
    assert len({ForwardKL(), ForwardKL(), ReverseKL(), Tempered(ForwardKL(), 2.0)}) == 3
    with pytest.raises(FrozenInstanceError):
        JensenShannon(0.5).beta = 0.1


def test_the_command_line_builds_them_by_class_name():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--divergence", type=Divergence)
    options = [
        "--divergence=okd_lightning.divergences.Tempered",
        "--divergence.temperature=2",
        "--divergence.divergence=okd_lightning.divergences.JensenShannon",
        "--divergence.divergence.beta=0.25",
    ]
    # The older name is all that the oldest supported jsonargparse has; the newest deprecates it.
    name = "instantiate" if hasattr(parser, "instantiate") else "instantiate_classes"
    built = getattr(parser, name)(parser.parse_args(options)).divergence
    assert built == Tempered(JensenShannon(0.25), 2.0)


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(2, 4, 8, generator=generator, dtype=torch.float64)
    return tuple(torch.log_softmax(logits, dim=-1))


@pytest.mark.parametrize(("beta", "limit"), [(1e-6, ForwardKL()), (1 - 1e-6, ReverseKL())])
def test_jensen_shannon_fades_at_its_ends_and_its_normalised_form_does_not(pair, beta, limit):
    kl = limit.value(*pair)
    torch.testing.assert_close(JensenShannon(float(round(beta))).value(*pair), kl, rtol=0, atol=0)
    torch.testing.assert_close(JensenShannon(beta).value(*pair), 1e-6 * kl, rtol=1e-4, atol=0)
    near_end = JensenShannon(beta, normalised=True).value(*pair)
    torch.testing.assert_close(near_end, kl, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("alpha", "member", "factor"),
    [
        (0.0, ReverseKL(), 1.0),
        (1e-9, ReverseKL(), 1.0),
        (1.0, ForwardKL(), 1.0),
        (1 - 1e-9, ForwardKL(), 1.0),
        (0.5, SquaredHellinger(), 2.0),
        (2.0, PearsonChiSquared(), 0.5),
        (-1.0, NeymanChiSquared(), 0.5),
    ],
)
def test_alpha_family_contains_its_members(pair, alpha, member, factor):
    family = AlphaDivergence(alpha)
    torch.testing.assert_close(
        family.value(*pair), factor * member.value(*pair), rtol=1e-7, atol=1e-12
    )
    log_ratio = pair[1] - pair[0]
    torch.testing.assert_close(
        family.centred_weight(log_ratio),
        factor * member.centred_weight(log_ratio),
        rtol=1e-7,
        atol=1e-12,
    )


@pytest.mark.parametrize(
    ("skew", "limit"), [(SkewForwardKL, ForwardKL()), (SkewReverseKL, ReverseKL())]
)
def test_skew_kl_tends_to_kl(pair, skew, limit):
    torch.testing.assert_close(skew(1e-8).value(*pair), limit.value(*pair), rtol=1e-6, atol=0)
    assert (skew(0.1).value(*pair) < limit.value(*pair)).all()
