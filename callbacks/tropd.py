"""TrOPD: reverse KL where the teacher can be trusted, forward KL where it cannot.

Xing et al., "Trust Region On-Policy Distillation", arXiv 2606.01249, section 3: a token is trusted
with probability min(q/p, 1), the acceptance of speculative decoding.

Differs from the paper:

- No coin is drawn: both terms are weighted with its probabilities, which is the same in expectation
  and does not depend on how batches are cut.
- The off-policy guidance (β = 0.001, annealed to 0) is left out: the student would have to go on
  from a prefix of the teacher's, but a row has one author.
- The credit and the trust are of the current student, also where a rollout batch serves several
  steps.

Not compared with released code: the authors' repository (Xingrun-Xing2/TrOPD, commit b4bee6f)
holds a description and a log, and no code.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from okd_lightning.callbacks import PolicyGradientCallback
from okd_lightning.divergences import ReverseKL
from okd_lightning.errors import ConfigError
from okd_lightning.losses import DrawnLogProb, DrawnOutcome, Measured, Quantity, Tile
from okd_lightning.records import LossOutput
from okd_lightning.reduction import masked_sum

_STUDENT, _TEACHER = DrawnLogProb("student"), DrawnOutcome("teacher", ReverseKL())


@dataclass(frozen=True)
class TopForwardKL(Quantity):
    """Σ q (log q - log p) over the teacher's k likeliest ids, nats, with gradient to the student.

    Not a divergence: without the tail it may be negative.
    """

    k: int = 64
    needs_teacher = True

    def measure(self, tile: Tile) -> Tensor:
        """[positions] nats."""
        teacher = tile.teacher_logprobs.detach()
        top, ids = teacher.topk(min(self.k, teacher.shape[-1]), -1)
        terms = top.exp() * (top - tile.student_logprobs.gather(-1, ids))
        return terms.masked_fill(top == float("-inf"), 0.0).sum(-1)


class TrOPD(PolicyGradientCallback):
    """m ρ log(q/p) by policy gradient, and (1 - m) Σ_top-k q log(q/p) directly, m = min(q/p, 1).

    On the student's own responses; m is a constant, its mean is logged as ``train/<name>_trusted``.

    Args:
        top_k: Ids of the teacher that the forward KL is summed over.
        weight: Factor on this term's mean loss.
        name: Logged as ``train/<name>``.
    """

    def __init__(self, top_k: int = 64, weight: float = 1.0, name: str | None = None) -> None:
        super().__init__(weight=weight, name=name)
        if top_k < 1:
            raise ConfigError(f"TrOPD: top_k must be at least 1, got {top_k}")
        self.outliers = TopForwardKL(top_k)

    @property
    def quantities(self) -> tuple[Quantity, ...]:
        """Both sides' log-probs of the drawn token, and the forward KL."""
        return (_STUDENT, _TEACHER, self.outliers)

    def credit(self, measured: Measured) -> tuple[Tensor, dict[str, Tensor]]:
        """The trusted share times log(q/p): 0 where the teacher rules a token out."""
        log_ratio = (measured[_TEACHER] - measured[_STUDENT]).detach()
        trusted = log_ratio.clamp(max=0.0).exp()
        return (trusted * log_ratio).nan_to_num(nan=0.0), {"trusted": trusted}

    def loss(self, measured: Measured) -> LossOutput:
        """Both sums over the student's own tokens."""
        inside = super().loss(measured)
        outside = (1 - self.credit(measured)[1]["trusted"]) * measured[self.outliers]
        own = measured.mask(self.sources)
        return replace(inside, sum=inside.sum + masked_sum(outside, own))
