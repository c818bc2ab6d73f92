"""Frozen here: what is called bias, and what noise, of estimated gradients.

* An unbiased estimator's component along the exact mean is 1, a scaled one's its scale, an opposite
  one's negative; within the jackknife's errors, which are those of repeated draws.
* ``noise`` is the trace of one batch's covariance over the exact mean's squared norm.
"""

from __future__ import annotations

import math

import pytest
import torch

from okd_lightning.metrics import gradient_fidelity

MEAN = torch.linspace(-1, 1, 50)


def batches(seed: int, scale: float = 1.0, spread: float = 1.0, num: int = 400) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * MEAN + spread * torch.randn(num, 50, generator=generator)


@pytest.mark.parametrize("scale", [1.0, 0.5, -2.0])
def test_bias_is_the_scale(scale):
    found = gradient_fidelity(batches(1, scale, spread=3.0), batches(2))
    assert found.along_exact == pytest.approx(scale, abs=3 * found.along_error)
    assert found.along_error < 0.1
    assert found.is_biased == (scale != 1.0)
    assert found.cosine == pytest.approx(math.copysign(1.0, scale), abs=3 * found.cosine_error)


def test_noise_is_covariance_over_signal():
    found = gradient_fidelity(batches(1, spread=3.0), batches(2))
    expected = 50 * 9.0 / float(MEAN.square().sum())
    assert found.noise == pytest.approx(expected, rel=0.05)
    assert found.noise_over_exact == pytest.approx(9.0, rel=0.05)
    assert found.signal_to_noise == pytest.approx(expected**-0.5, rel=0.05)


def test_error_is_that_of_repeated_draws():
    found = [
        gradient_fidelity(batches(10 + i, spread=3.0, num=40), batches(500 + i, num=40))
        for i in range(100)
    ]
    spread = torch.tensor([one.along_exact for one in found]).std()
    claimed = torch.tensor([one.along_error for one in found]).mean()
    assert float(claimed) == pytest.approx(float(spread), rel=0.25)


def test_two_batches_give_no_error():
    found = gradient_fidelity(batches(1, num=2), batches(2, num=2))
    assert math.isnan(found.along_error)
    assert not found.is_biased
