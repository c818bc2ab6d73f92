"""Knowledge distillation on dataset responses."""

from __future__ import annotations

from okd_lightning.callbacks.methods.divergence import DivergenceCallback
from okd_lightning.divergences import Divergence


class KD(DivergenceCallback):
    """Match the teacher's distribution on dataset responses (Hinton et al., arXiv 1503.02531).

    The loss of a token is (1 - w) τ² KL(q^τ‖p^τ) + w CE, teacher q, student p; Eq. 2 of OKD
    (arXiv 2409.12512). Another ``divergence`` gives other methods, such as reverse KD.

    Args:
        divergence: The minimised divergence; forward KL by default.
        temperature: τ of both distributions; scales loss and gradient by τ².
        cross_entropy_weight: w, in [0, 1).
        seq_kd: Train on the teacher's generations instead of dataset responses.
        weight: Factor on this term's mean loss.
        name: Logged as ``train/<name>``; two methods of one class need different names.

    Raises:
        ConfigError: A setting out of its range.
    """

    def __init__(
        self,
        divergence: Divergence | None = None,
        temperature: float = 1.0,
        cross_entropy_weight: float = 0.0,
        seq_kd: bool = False,
        weight: float = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__(
            divergence=divergence,
            temperature=temperature,
            cross_entropy_weight=cross_entropy_weight,
            on_policy_fraction=0.0,
            seq_kd=seq_kd,
            weight=weight,
            name=name,
        )
