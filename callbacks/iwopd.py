"""IW-OPD: early tokens of a rollout have more weight than those after a prefix that has drifted.

Xie et al., "On the Position Bias of On-Policy Distillation", arXiv 2606.22600, Algorithm 1.

Differs from the paper:

- The paper uses PPO's clip, 0.2; here the clip is off by default, because a rollout batch serves
  one optimizer step unless ``data.prompts_per_rollout`` is larger.
- The advantage uses the current student's log-probabilities, in the paper those at rollout time.
  Both are equal if a rollout batch serves one optimizer step; ``frozen_credit`` gives the paper's
  if it serves several.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from okd_lightning import AdvantageCallback
from okd_lightning.advantages import Advantage
from okd_lightning.errors import ConfigError


@dataclass(frozen=True)
class PrefixWeighted(Advantage):
    """w_t a_t, with a_t = log q - log p and w_t = 1 + γ (1 - Σ_{k<t} |a_k| / Σ_k |a_k|)."""

    gamma: float = 0.5
    is_positionwise = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.gamma) and self.gamma >= 0):
            raise ConfigError(f"IW-OPD: gamma must be a number from 0 on, got {self.gamma}")

    def credit(
        self, student_logprobs: Tensor, teacher_logprobs: Tensor, mask: Tensor, state_value=None
    ) -> Tensor:
        """Return [rows, tokens] nats, without gradient."""
        credit = (teacher_logprobs - student_logprobs).where(mask, 0.0).detach()
        size = credit.abs()
        before = size.cumsum(-1) - size
        drift = before / size.sum(-1, keepdim=True).clamp(min=1e-8)
        return (1 + self.gamma * (1 - drift)) * credit


class IWOPD(AdvantageCallback):
    """OPD with reverse KL, weighted by the share of a response's discrepancy from a token on.

    Args:
        gamma: γ, additional weight of the first token; 0 is OPD.
        clip: PPO's ε; None for off.
        weight: Factor on this term's mean loss.
        name: Logged as ``train/<name>``.
        frozen_credit: Compute the advantage with the student at rollout time.
    """

    def __init__(
        self,
        gamma: float = 0.5,
        clip: float | None = None,
        weight: float = 1.0,
        name: str | None = None,
        frozen_credit: bool = False,
    ) -> None:
        super().__init__(
            PrefixWeighted(gamma), clip=clip, weight=weight, name=name, frozen_credit=frozen_credit
        )
