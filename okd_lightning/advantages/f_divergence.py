"""The advantage of an f-divergence: as commonly used, and corrected so that any f is unbiased."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from okd_lightning.advantages.base import Advantage
from okd_lightning.divergences import Divergence, Tempered, as_divergence
from okd_lightning.errors import ConfigError
from okd_lightning.records.shapes import RowMask, RowValues

Variant: TypeAlias = Literal["stopped_reward", "as_published", "centred", "value_baseline"]
"""Form of the advantage; see ``FDivergenceAdvantage``."""

_TRAPS = {
    "per_state_kl": "the exact divergence of a state is the same for every token that could be "
    "drawn there, so its expected gradient as an advantage is zero; train on it directly (GKD with "
    "on_policy_fraction 1), or use variant centred",
    "k1": "differentiated directly, k1 = log p - log q has zero expected gradient; use "
    "OPDPlus with ReverseKL, where it is a stopped reward",
    "k2": "differentiated directly, k2 = (log p - log q)²/2 gives the gradient of reverse KL; use "
    "OPDPlus with ReverseKL",
    "k3": "differentiated directly, k3 gives the gradient of forward KL and not of the reverse KL "
    "that it estimates; use OPDPlus with the divergence you mean",
    "z_score": "dividing by a batch's standard deviation and subtracting its mean can reverse the "
    "sign of an advantage near zero, which tells whether the student's probability of a token "
    "should fall or rise; use variant centred or value_baseline",
}
_TRAP_NAMES = {
    "per_state": "per_state_kl",
    "exact": "per_state_kl",
    "kl": "per_state_kl",
    "z_scored": "z_score",
    "zscore": "z_score",
    "normalised": "z_score",
    "normalized": "z_score",
    "whitened": "z_score",
}


def reward_to_go(rewards: RowValues, mask: RowMask, discount: float) -> RowValues:
    """G_k = Σ_{n≥k} γ^(n-k) r_n over the tokens of each row whose mask is True.

    Args:
        rewards: [rows, tokens] r, any unit.
        mask: [rows, tokens] True where a token counts; the others are skipped, not discounted.
        discount: γ in [0, 1].

    Returns:
        [rows, tokens], zero where the mask is False.
    """
    kept = rewards.where(mask, 0.0)
    total = torch.zeros_like(kept)
    running = kept.new_zeros(kept.shape[0])
    for position in reversed(range(kept.shape[1])):
        is_in = mask[:, position]
        running = torch.where(is_in, kept[:, position] + discount * running, running)
        total[:, position] = running.where(is_in, 0.0)
    return total


@dataclass(frozen=True)
class FDivergenceAdvantage(Advantage):
    """Advantage A of a token sampled from the student p, with u = q/p of that token.

    | variant | A (γ = 0) | expected gradient of -A ∇log p |
    |---|---|---|
    | ``stopped_reward`` | -f(u) | that of D_f for reverse KL only, else **biased** (OPD) |
    | ``as_published`` | w_f(u) = -f(u) + u f'(u) | that of D_f (OPD+, arXiv 2606.01039) |
    | ``centred`` | w_f(u) - w_f(1) | the same, zero where p and q agree |
    | ``value_baseline`` | w_f(u) - E_p[w_f] | the same, zero mean at every position |

    The subtracted baselines add no bias if every token can be sampled (any temperature above 0) and
    ρ is not bounded.

    A discount γ > 0 adds the later rewards Σ_{n>k} γ^(n-k) (-f(u_n)) to token k. The term u f'(u)
    is that of token k only: it is the dependence of f(u_k) on θ, and later tokens have their own
    (METHODS: reward-to-go of w_f would be wrong).

    Args:
        divergence: f. A TopK gives the advantage of the token's outcome.
        variant: Form of the advantage.
        discount: γ in [0, 1]; 0 treats prefixes as constant (OPD+); 1 is the gradient of the whole
            sequence's divergence.
        max_log_ratio: ln u is clipped to ± this many nats, which adds bias; inf for off.

    Raises:
        ConfigError: A setting out of its range, a tempered divergence, or a variant that is a known
            mistake, with the alternative.
    """

    divergence: Divergence = field()  # else dataclass takes the base's None as the default
    variant: str = "centred"
    discount: float = 0.0
    max_log_ratio: float = math.inf

    def __post_init__(self) -> None:
        object.__setattr__(self, "divergence", as_divergence(self.divergence))
        trap = _TRAP_NAMES.get(self.variant, self.variant)
        if trap in _TRAPS:
            raise ConfigError(f"variant {self.variant} is refused: {_TRAPS[trap]}")
        if self.variant not in get_args(Variant):
            raise ConfigError(
                f"variant is {self.variant!r}; expected one of {', '.join(get_args(Variant))}"
            )
        if not 0 <= self.discount <= 1:
            raise ConfigError(f"discount must be between 0 and 1, got {self.discount}")
        if not self.max_log_ratio > 0:
            raise ConfigError(f"max_log_ratio must be above 0, got {self.max_log_ratio}")
        if isinstance(self.divergence, Tempered):
            raise ConfigError(
                "a tempered divergence is an expectation over the tempered student, but tokens are "
                "drawn from the student itself; use temperature 1, or an exact method (GKD)"
            )

    @property
    def is_positionwise(self) -> bool:  # type: ignore[override]
        """True without a discount."""
        return self.discount == 0

    @property
    def state_value_of(self) -> Divergence | None:
        """The divergence, for ``value_baseline``."""
        return self.divergence if self.variant == "value_baseline" else None

    @torch.no_grad()
    def credit(
        self,
        student_logprobs: RowValues,
        teacher_logprobs: RowValues,
        mask: RowMask,
        state_value: RowValues | None = None,
    ) -> RowValues:
        """Return the advantages, [rows, tokens] nats; see ``Advantage.credit``."""
        log_ratio = self._log_ratio(student_logprobs, teacher_logprobs, mask)
        if self.variant == "stopped_reward":
            credit = -self.divergence.generator(log_ratio)
        elif self.variant == "centred":
            credit = self.divergence.centred_weight(log_ratio)
        else:
            credit = self.divergence.weight(log_ratio)
        if self.variant == "value_baseline":
            assert state_value is not None
            credit = credit - state_value
        if self.discount:
            rewards = -self.divergence.generator(log_ratio).where(mask, 0.0)
            credit = credit + reward_to_go(rewards, mask, self.discount) - rewards
        return credit.where(mask, 0.0)

    @torch.no_grad()
    def chunk_credit(
        self,
        student_logprobs: RowValues,
        teacher_logprobs: RowValues,
        mask: RowMask,
        state_value: RowValues | None = None,
    ) -> RowValues:
        """Return the advantages of chunks; with γ = 1 those of the whole response's rewards.

        A_k = Σ_n -f(u_n) + u_k f'(u_k), n over all chunks of the response: the gradient of
        E[Σ_n f(u_n)], also where the chunks that a sum over the rest begins with depend on it.
        """
        sampled = student_logprobs, teacher_logprobs, mask
        credit = replace(self, discount=0.0).credit(*sampled, state_value)
        if not self.discount:
            return credit
        rewards = -self.divergence.generator(self._log_ratio(*sampled)).where(mask, 0.0)
        return (credit + rewards.sum(-1, keepdim=True) - rewards).where(mask, 0.0)

    def metrics(
        self, student_logprobs: Tensor, teacher_logprobs: Tensor, mask: Tensor
    ) -> dict[str, Tensor]:
        """Return the share of tokens with a clipped log-ratio, if a clip is set."""
        if math.isinf(self.max_log_ratio):
            return {}
        log_ratio = (teacher_logprobs - student_logprobs).detach()
        is_clipped = (log_ratio.abs() > self.max_log_ratio) & mask
        return {"log_ratio_clipped": is_clipped.to(log_ratio.dtype)}

    def _log_ratio(self, student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
        """Return λ of the sampled tokens, in float32 or wider, 0 where none was sampled."""
        wide = torch.promote_types(student.dtype, torch.float32)
        log_ratio = (teacher.to(wide) - student.to(wide)).where(mask, 0.0)
        return log_ratio.clamp(-self.max_log_ratio, self.max_log_ratio)
