"""Generalised knowledge distillation: any divergence, also on on-policy samples."""

from __future__ import annotations

from okd_lightning.callbacks.methods.divergence import DivergenceCallback
from okd_lightning.divergences import Divergence, JensenShannon
from okd_lightning.errors import ConfigError


class GKD(DivergenceCallback):
    """On-policy distillation with an exact divergence (Agarwal et al., arXiv 2306.13649, Alg. 1).

    Each optimizer step uses on-policy samples with probability λ, else dataset responses; the loss
    is D(student, teacher) on them, without gradient through sampling.

    Args:
        beta: β of the generalised Jensen-Shannon divergence β KL(q‖m) + (1-β) KL(p‖m),
            m = βq + (1-β)p, in [0, 1]; 0 is forward KL and 1 reverse KL. None means 0.5.
        on_policy_fraction: λ, in [0, 1].
        divergence: Any other divergence, in place of beta.
        temperature: τ of both distributions; scales loss and gradient by τ².
        seq_kd: Train the other steps on the teacher's generations instead of dataset responses.
        weight: Factor on this term's mean loss.
        name: Logged as ``train/<name>``; two methods of one class need different names.

    Raises:
        ConfigError: A setting out of its range, or both beta and divergence.
    """

    def __init__(
        self,
        beta: float | None = None,
        on_policy_fraction: float = 0.5,
        divergence: Divergence | None = None,
        temperature: float = 1.0,
        seq_kd: bool = False,
        weight: float = 1.0,
        name: str | None = None,
    ) -> None:
        if beta is not None and divergence is not None:
            raise ConfigError(f"GKD takes beta ({beta}) or divergence ({divergence!r}), not both")
        if divergence is None:
            divergence = JensenShannon(0.5 if beta is None else beta)
        super().__init__(
            divergence=divergence,
            temperature=temperature,
            on_policy_fraction=on_policy_fraction,
            seq_kd=seq_kd,
            weight=weight,
            name=name,
        )
