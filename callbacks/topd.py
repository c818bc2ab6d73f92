"""TOP-D: OPD towards a proximal teacher, a mixture of the teacher and the student.

Xie et al., "Trust Region Policy Distillation", arXiv 2607.04751, section 3: the target of the
student p is not the teacher q but αq + (1-α)p with the student stopped. The reward of a token is
ln(αu + 1-α), u = q/p, which is at least ln(1-α); at α = 1 it is OPD's.

Differs from the paper:

- The reward is -f(u) of the skew reverse KL, KL(p‖αq + (1-α)p), without its dependence on the
  student. ``variant: centred`` and ``value_baseline`` give the corrected weight
  w_f = ln(αu + 1-α) - αu/(αu + 1-α) in its place (OPD+, arXiv 2606.01039), whose expected gradient
  is that of this divergence. It points the same way at every token, and both vanish where q = p.
- Rewards are not z-normalised over a group: that changes the sign of small ones.
- u uses the current student, in the paper the student at rollout time. Both are equal if a rollout
  batch serves one optimizer step; ``frozen_credit`` gives the paper's.
- PPO's clip on ρ is off by default, because a rollout batch serves one optimizer step unless
  ``data.prompts_per_rollout`` is larger.
- The paper is known from two public implementations and reviews of it; α = 0.2 is the example in
  NVIDIA NeMo RL's documentation, not a value that we have seen in the paper.

Differs from PrimeIntellect-ai/prime-rl (``orchestrator/algo/topd.py``, commit af74547), which

- z-normalises a token's return over its whole group;
- adds the mean of the later rewards (Eq. 8 of the paper) always; here ``future: true`` adds it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from okd_lightning import AdvantageCallback
from okd_lightning.advantages import Advantage, FDivergenceAdvantage, reward_to_go
from okd_lightning.divergences import Divergence, SkewReverseKL
from okd_lightning.errors import ConfigError


@dataclass(frozen=True)
class ProximalReward(Advantage):
    """The advantage of the skew reverse KL whose mixture has a share α of the teacher."""

    alpha: float = 0.2
    variant: str = "stopped_reward"
    future: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 1:
            raise ConfigError(
                f"TOP-D: alpha must be above 0 and below 1, got {self.alpha}; at 1 it is OPD"
            )
        _ = self._own  # which checks the variant

    @cached_property
    def _own(self) -> FDivergenceAdvantage:
        return FDivergenceAdvantage(SkewReverseKL(1 - self.alpha), self.variant)

    @property
    def is_positionwise(self) -> bool:  # type: ignore[override]
        """True without the later rewards."""
        return not self.future

    @property
    def state_value_of(self) -> Divergence | None:
        """The divergence, for ``value_baseline``."""
        return self._own.state_value_of

    @torch.no_grad()
    def credit(
        self,
        student_logprobs: Tensor,
        teacher_logprobs: Tensor,
        mask: Tensor,
        state_value: Tensor | None = None,
    ) -> Tensor:
        """Return [rows, tokens] nats: the token's advantage, plus the mean of the later rewards."""
        credit = self._own.credit(student_logprobs, teacher_logprobs, mask, state_value)
        if not self.future:
            return credit
        log_ratio = (teacher_logprobs - student_logprobs).where(mask, 0.0)
        rewards = -self._own.divergence.generator(log_ratio).where(mask, 0.0)
        later = reward_to_go(rewards, mask, 1.0) - rewards
        number = reward_to_go(torch.ones_like(rewards), mask, 1.0) - 1
        return (credit + later / number.clamp(min=1)).where(mask, 0.0)


class TOPD(AdvantageCallback):
    """Policy gradient with A = ln(α q/p + 1-α) on the sampled tokens.

    Args:
        alpha: α, the teacher's share of the proximal teacher, above 0 and below 1.
        variant: stopped_reward is the paper's; as_published, centred and value_baseline are the
            corrected weight of the same divergence (``FDivergenceAdvantage``).
        future: Add the mean of the response's later rewards (Eq. 8).
        clip: PPO's ε; None for off.
        weight: Factor on this term's mean loss.
        name: Logged as ``train/<name>``.
        frozen_credit: Compute the advantage with the student at rollout time.
    """

    def __init__(
        self,
        alpha: float = 0.2,
        variant: str = "stopped_reward",
        future: bool = False,
        clip: float | None = None,
        weight: float = 1.0,
        name: str | None = None,
        frozen_credit: bool = False,
    ) -> None:
        advantage = ProximalReward(alpha, variant, future)
        super().__init__(
            advantage, clip=clip, weight=weight, name=name, frozen_credit=frozen_credit
        )
