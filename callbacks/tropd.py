"""TrOPD: reverse KL where the teacher is trusted, forward KL elsewhere.

Xing et al., "Trust Region On-Policy Distillation", arXiv 2606.01249, section 3: a token is trusted
with probability min(q/p, 1), the acceptance of speculative decoding.

Differs from the paper:

- Trust is not sampled: both terms are weighted by its probabilities, which is the same in
  expectation and does not depend on how batches are divided.
- The off-policy guidance (β = 0.001, annealed to 0) is left out: the student would have to continue
  a prefix of the teacher's, but a row has one generator.
- Advantage and trust use the current student, also if a rollout batch serves several steps.

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
from okd_lightning.losses.reduction import masked_sum
from okd_lightning.records.batches import LossOutput

_STUDENT, _TEACHER = DrawnLogProb("student"), DrawnOutcome("teacher", ReverseKL())


@dataclass(frozen=True)
class TopForwardKL(Quantity):
    """Σ q (log q - log p) over the teacher's top-k ids, nats, with gradient to the student.

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

    On on-policy responses; m is a constant, its mean is logged as ``train/<name>_trusted``.

    Args:
        top_k: Number of the teacher's most likely ids in the forward KL.
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
        """Both sides' log-probabilities of the sampled token, and the forward KL."""
        return (_STUDENT, _TEACHER, self.outliers)

    def credit(self, measured: Measured) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the trusted share times log(q/p): 0 where the token has q = 0."""
        log_ratio = (measured[_TEACHER] - measured[_STUDENT]).detach()
        trusted = log_ratio.clamp(max=0.0).exp()
        return (trusted * log_ratio).nan_to_num(nan=0.0), {"trusted": trusted}

    def loss(self, measured: Measured) -> LossOutput:
        """Return both sums over the sampled tokens."""
        inside = super().loss(measured)
        outside = (1 - self.credit(measured)[1]["trusted"]) * measured[self.outliers]
        own = measured.mask(self.sources)
        return replace(inside, sum=inside.sum + masked_sum(outside, own))
