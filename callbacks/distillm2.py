"""DistiLLM-2: pull up on the teacher's responses, push down on the student's.

Ko et al., "DistiLLM-2: A Contrastive Approach Boosts the Distillation of LLMs", arXiv 2503.07067,
Eq. 5: skew KL on what the teacher wrote, skew reverse KL on what the student wrote, with equal
weights. Differs from the paper: every token counts alike, and not every response; a prompt is
answered by one of the two, in halves of every optimizer step; the student writes anew for each
step, or for each chunk of data.prompts_per_rollout, and not once an epoch. The curricula of β and α
(section 3.3) are left out, as in the defaults of the paper's code.
"""

from __future__ import annotations

from okd_lightning import DistillationCallback
from okd_lightning.divergences import SkewForwardKL, SkewReverseKL
from okd_lightning.losses import ExactDivergence, Measured, Quantity
from okd_lightning.records import LossOutput
from okd_lightning.reduction import loss_output


class DistiLLM2(DistillationCallback):
    """KL(q‖αq + (1-α)p) on the teacher's responses and KL(p‖(1-α)q + αp) on the student's own.

    Args:
        alpha: α of both, strictly between 0 and 1.
        weight: Factor on this term's mean loss.
        name: Logged as ``train/<name>``.
    """

    sources = ("teacher", "student")
    on_policy_fraction = 0.5
    mixes_rows = True

    def __init__(self, alpha: float = 0.1, weight: float = 1.0, name: str | None = None) -> None:
        super().__init__(weight, name)
        self.pull = ExactDivergence(SkewForwardKL(alpha))
        self.push = ExactDivergence(SkewReverseKL(alpha))

    @property
    def quantities(self) -> tuple[Quantity, ...]:
        """Both divergences."""
        return (self.pull, self.push)

    def loss(self, measured: Measured) -> LossOutput:
        """The sum over both authors' rows, in nats."""
        own = measured.mask(("student",))
        values = measured[self.push].where(own, measured[self.pull])
        return loss_output(values, measured.mask(self.sources))
