"""ImitKD: imitation learning of the teacher, on dataset responses and on-policy samples.

Lin et al., "Autoregressive Knowledge Distillation through Imitation Learning", arXiv 2009.07253.

Differs from the paper:

- Its mixing weight falls over training; here the share is constant, with a random choice for each
  optimizer step (as in GKD, arXiv 2306.13649). ``Stage`` changes it in steps.
- Its "optimal" variant imitates the teacher's most likely next token; here the teacher's whole
  distribution is imitated (its "full" variant).

Differs from the released code: it was not compared.
"""

from __future__ import annotations

from okd_lightning import DivergenceCallback
from okd_lightning.divergences import ForwardKL


class ImitKD(DivergenceCallback):
    """Forward KL to the teacher on dataset responses and on-policy samples.

    Args:
        on_policy_fraction: Share of optimizer steps with on-policy samples.
        temperature: τ of both distributions; scales loss and gradient by τ².
        weight: Factor on this term's mean loss.
        name: Logged as ``train/<name>``.
    """

    def __init__(
        self,
        on_policy_fraction: float = 0.5,
        temperature: float = 1.0,
        weight: float = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__(
            ForwardKL(),
            temperature=temperature,
            on_policy_fraction=on_policy_fraction,
            weight=weight,
            name=name,
        )
