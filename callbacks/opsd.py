"""OPSD: on-policy self-distillation, with a privileged prompt for the model as its own teacher.

Zhao et al., "Self-Distilled Reasoner: On-Policy Self-Distillation for Large Language Models", arXiv
2601.18734 v3, Eqs. 6 and 8 with forward KL, and the pointwise clip of section 3.2.

Differs from the paper:

- Every token has the same weight; in the paper every response.
- The value of the clip, 0.05 nats, is ours.

Differs from the released code (siyan-zhao/OPSD, commit 590ec26):

- Neither that commit nor an earlier one has a clip: its scripts minimise the Jensen-Shannon
  divergence with β = ½ (GKD with ``JensenShannon`` here).
- It samples at temperature 1.1 with top-p 0.95 and top-k 20, and trains LoRA of rank 64 on all
  projections; here these are options of the data (``--data.sampling``) and the model
  (``--model.student_adapter``), by default temperature 1, no cut and all weights.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from okd_lightning import DistillationCallback
from okd_lightning.errors import ConfigError
from okd_lightning.losses import Measured, Quantity, Tile
from okd_lightning.losses.reduction import loss_output
from okd_lightning.records.batches import LossOutput


@dataclass(frozen=True)
class ClippedForwardKL(Quantity):
    """Σ_a min(q (log q - log p), τ): every summand is clipped from above; it may be negative."""

    clip: float
    needs_teacher = True

    def measure(self, tile: Tile) -> Tensor:
        """Return [positions] nats, with gradient to the student except from clipped summands."""
        teacher = tile.teacher_logprobs.detach()
        terms = teacher.exp() * (teacher - tile.student_logprobs)
        return terms.masked_fill(teacher == float("-inf"), 0.0).clamp(max=self.clip).sum(-1)


class OPSD(DistillationCallback):
    """Clipped forward KL to the privileged teacher on on-policy responses.

    The teacher is the student itself: --model.teacher FrozenSelf (the paper's: its initial
    weights), with a --data.teacher_prompt_template that contains the reference solution.

    Args:
        clip: τ, nats per id; inf for plain forward KL.
        weight: Factor on this term's mean loss.
        name: Logged as ``train/<name>``.
    """

    sources = ("student",)
    on_policy_fraction = 1.0
    quantities: tuple[Quantity, ...] = ()
    needs_teacher_prompt = True

    def __init__(self, clip: float = 0.05, weight: float = 1.0, name: str | None = None) -> None:
        super().__init__(weight, name)
        if not clip > 0:
            raise ConfigError(f"OPSD: clip must be above 0 (inf for none), got {clip}")
        self.quantities = (ClippedForwardKL(clip),)

    def loss(self, measured: Measured) -> LossOutput:
        """Return the sum over the sampled tokens, in nats."""
        return loss_output(measured[self.quantities[0]], measured.mask(self.sources))
