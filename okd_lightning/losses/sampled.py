"""The sampled loss: policy gradient on the sampled tokens, -Σ ρ A.

Owns the importance ratio and its truncation or clip. The advantage A comes from ``advantages``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from okd_lightning.errors import ConfigError
from okd_lightning.records.shapes import PositionValues


@dataclass(frozen=True)
class ImportanceRatio:
    """Importance ratio ρ = p_θ(token) / p_sampler(token) with an optional bound.

    Strictly on-policy, ρ is 1 up to numerical differences of the engines. On responses of an
    earlier student it corrects for the training since. Both bounds bias the gradient where they
    apply.

    Args:
        max_ratio: Truncation: min(ρ, max_ratio) is the coefficient (Espeholt et al., arXiv
            1802.01561); inf for off.
        clip: PPO's ε (Schulman et al., arXiv 1707.06347, Eq. 7): no gradient where ρ is outside
            [1-ε, 1+ε] and the advantage would move it further out; None for off.

    Raises:
        ConfigError: A bound that is not above 0, an ε that is not in (0, 1), or both at once.
    """

    max_ratio: float = math.inf
    clip: float | None = None

    def __post_init__(self) -> None:
        if not self.max_ratio > 0:
            raise ConfigError(f"max_ratio must be above 0, got {self.max_ratio}")
        if self.clip is not None and not 0 < self.clip < 1:
            raise ConfigError(f"clip must be between 0 and 1, got {self.clip}")
        if self.clip is not None and math.isfinite(self.max_ratio):
            raise ConfigError(
                f"max_ratio {self.max_ratio} and clip {self.clip} bound the same ratio; give one"
            )

    @property
    def is_bounded(self) -> bool:
        """True if a bound is set."""
        return self.clip is not None or math.isfinite(self.max_ratio)

    def loss(
        self, logprobs: PositionValues, sampler_logprobs: PositionValues, credit: PositionValues
    ) -> PositionValues:
        """Return -ρ A of every token.

        Args:
            logprobs: [positions] log p_θ of the sampled tokens (nats), with gradient.
            sampler_logprobs: [positions] the same under the sampling distribution.
            credit: [positions] the advantage A; detached here.

        Returns:
            [positions]; its gradient is -ρ A ∇log p_θ within the bounds, and flows to ``logprobs``.
        """
        ratio = (logprobs - sampler_logprobs.to(logprobs.dtype)).exp()
        credit = credit.detach().to(logprobs.dtype)
        if self.clip is not None:
            bounded = ratio.clamp(1 - self.clip, 1 + self.clip)
            return -torch.minimum(ratio * credit, bounded * credit)
        coefficient = ratio.detach().clamp(max=self.max_ratio)
        # the last factor is 1, with gradient ∇log p_θ
        return -coefficient * credit * (logprobs - logprobs.detach()).exp()

    @torch.no_grad()
    def metrics(self, logprobs: Tensor, sampler_logprobs: Tensor) -> dict[str, Tensor]:
        """Return [positions] to be logged: 1 where ρ is out of bounds; empty without a bound."""
        if not self.is_bounded:
            return {}
        low = 1 - self.clip if self.clip is not None else 0.0
        high = 1 + self.clip if self.clip is not None else self.max_ratio
        ratio = (logprobs - sampler_logprobs.to(logprobs.dtype)).exp()
        return {"ratio_bounded": ((ratio < low) | (ratio > high)).to(logprobs.dtype)}
