"""PowerOPD: OPD with a bounded reward.

Zhao et al., "PowerOPD: Stabilizing On-Policy Distillation with Bounded Power Transformation", arXiv
2606.17199, section 3: the Box-Cox power transformation in place of the logarithm of OPD's reward
log q - log p.

Differs from the paper:

- The factor 1/α of the transformation is left out, as in the paper's code. With it the reward would
  tend to OPD's for α → 0.
- The reward is stopped, as in the paper, so that its expected gradient is that of no divergence;
  q^α - p^α uses the current student, also if a rollout batch serves several steps.

Differs from the released code: no known differences; α = 5 is its default.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from okd_lightning import AdvantageCallback
from okd_lightning.advantages import Advantage
from okd_lightning.errors import ConfigError


@dataclass(frozen=True)
class PowerReward(Advantage):
    """q^α - p^α of the sampled token, in [-1, 1], with the sign of log q - log p."""

    alpha: float = 5.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ConfigError(
                f"PowerOPD: alpha must be above 0, got {self.alpha}; its limit 0 is OPD"
            )

    def credit(
        self, student_logprobs: Tensor, teacher_logprobs: Tensor, mask: Tensor, state_value=None
    ) -> Tensor:
        """Return [rows, tokens], without gradient."""
        student, teacher = self.alpha * student_logprobs, self.alpha * teacher_logprobs
        return (teacher.exp() - student.exp()).where(mask, 0.0).detach()


class PowerOPD(AdvantageCallback):
    """Policy gradient with A = q^α - p^α on the sampled tokens.

    Args:
        alpha: α, above 0; 5 is the default of the paper's code.
        weight: Factor on this term's mean loss.
        name: Logged as ``train/<name>``.
    """

    def __init__(self, alpha: float = 5.0, weight: float = 1.0, name: str | None = None) -> None:
        super().__init__(PowerReward(alpha), weight=weight, name=name)
