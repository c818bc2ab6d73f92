"""On-policy distillation as policy gradient: as commonly used (OPD) and corrected (OPD+)."""

from __future__ import annotations

import math

import lightning
from lightning.pytorch.utilities import rank_zero_warn

from okd_lightning.advantages import FDivergenceAdvantage
from okd_lightning.callbacks.methods.policy_gradient import AdvantageCallback
from okd_lightning.divergences import Divergence, ReverseKL
from okd_lightning.errors import ConfigError
from okd_lightning.training.module import DistillationModule


class OPD(AdvantageCallback):
    """The stopped reward -f(u) on the student's sampled tokens, as commonly used; a baseline.

    For reverse KL the advantage is ln u and the method is unbiased (Thinking Machines, "On-Policy
    Distillation", 2025). For every other divergence it is **biased**: forward KL and JSD get worse
    during training (OPD+, arXiv 2606.01039, Table 2; docs/opd.md). Use OPDPlus for those.

    Args:
        divergence: f; reverse KL by default.
        discount: γ in [0, 1].
        max_log_ratio: ln u is clipped to ± this many nats; inf for off.
        max_ratio: Truncation of ρ; inf for off. By default off, and 2 with ``data.rollout_lag``.
        clip: PPO's ε; None for off.
        weight: Factor on this term's mean loss.
        name: Logged as ``train/<name>``; two methods of one class need different names.
        frozen_credit: Compute ln u with the student that sampled the token, as in tinker, not the
            current one; the same if a rollout batch is one optimizer step.

    Raises:
        ConfigError: A setting out of its range.
    """

    def __init__(
        self,
        divergence: Divergence | None = None,
        discount: float = 0.0,
        max_log_ratio: float = math.inf,
        max_ratio: float | None = None,
        clip: float | None = None,
        weight: float = 1.0,
        name: str | None = None,
        frozen_credit: bool = False,
    ) -> None:
        advantage = FDivergenceAdvantage(
            ReverseKL() if divergence is None else divergence,
            "stopped_reward",
            discount,
            max_log_ratio,
        )
        super().__init__(advantage, max_ratio, clip, weight, name, frozen_credit)

    def prepare(self, trainer: lightning.Trainer, module: DistillationModule, stage: str) -> None:
        """Warn of the bias of a divergence other than reverse KL."""
        super().prepare(trainer, module, stage)
        divergence = self.advantage.divergence
        if stage == "fit" and not isinstance(divergence, ReverseKL):
            rank_zero_warn(
                f"{self.name}: the stopped reward of {type(divergence).__name__} is not its "
                "gradient; training may move away from the teacher. OPDPlus corrects it"
            )


class OPDPlus(AdvantageCallback):
    """The corrected advantage w_f(u) = -f(u) + u f'(u): unbiased for any f (arXiv 2606.01039).

    OPD omits the reward's dependence on the student, which is a constant only for reverse KL.
    Trains on on-policy responses, without normalisation, by default without discount and clipping.

    Args:
        divergence: f; reverse KL by default.
        variant: value_baseline subtracts the mean E_p[w_f] of each position (vOPD, arXiv
            2605.07865), centred the constant w_f(1), as_published nothing. All have the same
            expected gradient; the default has the least variance (docs/opd.md).
        discount: γ in [0, 1]; 0 is the paper's.
        max_log_ratio: ln u is clipped to ± this many nats; inf for off.
        max_ratio: Truncation of ρ; inf for off. By default off, and 2 with ``data.rollout_lag``.
        clip: PPO's ε; None for off.
        weight: Factor on this term's mean loss.
        name: Logged as ``train/<name>``; two methods of one class need different names.

    Raises:
        ConfigError: A setting out of its range; a variant that is a known mistake.
    """

    def __init__(
        self,
        divergence: Divergence | None = None,
        variant: str = "value_baseline",
        discount: float = 0.0,
        max_log_ratio: float = math.inf,
        max_ratio: float | None = None,
        clip: float | None = None,
        weight: float = 1.0,
        name: str | None = None,
    ) -> None:
        if variant == "stopped_reward":
            raise ConfigError("OPDPlus: variant stopped_reward is the biased one; use OPD for it")
        self.variant = variant
        advantage = FDivergenceAdvantage(
            ReverseKL() if divergence is None else divergence, variant, discount, max_log_ratio
        )
        super().__init__(advantage, max_ratio, clip, weight, name)

    def prepare(self, trainer: lightning.Trainer, module: DistillationModule, stage: str) -> None:
        """Warn if the constant in w_f adds bias: some tokens cannot be sampled, or ρ is bounded."""
        super().prepare(trainer, module, stage)
        divergence = self.advantage.divergence
        assert divergence is not None
        has_constant = self.variant == "as_published" and divergence.weight_at_one != 0
        if stage != "fit" or not has_constant:
            return
        sampling = getattr(getattr(trainer, "datamodule", None), "sampling", None)
        causes = [] if sampling is None else list(sampling.support_cuts)
        causes += ["a bounded importance ratio"] if self.ratio.is_bounded else []
        if causes:
            rank_zero_warn(
                f"{self.name}: with {' and '.join(causes)} the constant in w_f no longer has zero "
                "expected gradient: it raises or lowers the probability of every sampled token; "
                "use variant "
                "centred, or leave the bound or cut out"
            )
