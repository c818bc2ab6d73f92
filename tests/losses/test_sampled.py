"""The importance ratio and its bounds, on numbers that can be checked by hand.

Frozen here: -ρ A and its gradient; min(ρ, max_ratio) as the coefficient; PPO's clip; the counts.
"""

from __future__ import annotations

import math

import pytest
import torch

from okd_lightning.errors import ConfigError
from okd_lightning.losses import ImportanceRatio


class TestImportanceRatio:
    """-ρ A with its bounds, on numbers that can be checked by hand."""

    logprobs = torch.tensor([-1.0, -1.0, -1.0, -1.0])
    sampler = torch.tensor([-1.0, -2.0, -2.0, -0.5])
    credit = torch.tensor([2.0, 2.0, -2.0, 2.0])

    def gradient(self, ratio: ImportanceRatio) -> list[float]:
        leaf = self.logprobs.clone().requires_grad_()
        return torch.autograd.grad(ratio.loss(leaf, self.sampler, self.credit).sum(), leaf)[
            0
        ].tolist()

    def test_unbounded(self):
        rho = (self.logprobs - self.sampler).exp()
        assert self.gradient(ImportanceRatio()) == pytest.approx((-rho * self.credit).tolist())
        assert "ratio_bounded" not in ImportanceRatio().metrics(self.logprobs, self.sampler)

    def test_truncated(self):
        ratio = ImportanceRatio(max_ratio=1.5)
        rho = (self.logprobs - self.sampler).exp().clamp(max=1.5)
        assert self.gradient(ratio) == pytest.approx((-rho * self.credit).tolist())
        acting = ratio.metrics(self.logprobs, self.sampler)["ratio_bounded"]
        assert acting.tolist() == [0.0, 1.0, 1.0, 0.0]

    def test_clipped_as_ppo_does(self):
        """No gradient where ρ has gone beyond 1 ± ε in the advantage's own direction."""
        ratio = ImportanceRatio(clip=0.2)
        found = self.gradient(ratio)
        assert found[1] == 0.0  # ρ = e, good token: enough
        assert found[2] == pytest.approx(2 * math.e)  # ρ = e, bad token: still pushed down
        assert found[3] == pytest.approx(-2 * math.exp(-0.5))  # ρ < 1 - ε, good: pulled back up
        assert ratio.metrics(self.logprobs, self.sampler)["ratio_bounded"].sum() == 3

    def test_refused(self):
        for settings in ({"max_ratio": 0.0}, {"clip": 1.0}, {"clip": 0.2, "max_ratio": 2.0}):
            with pytest.raises(ConfigError, match=r"max_ratio|clip"):
                ImportanceRatio(**settings)
