"""IDA-OPD: OPD with smaller updates where they would lower the student's entropy.

Yang et al., "Influence-Directed Distillation: Solving the Diversity Bottleneck in Sampled-Token
On-Policy Distillation", arXiv 2608.29846. A step of size η along A ∇log p_y in the logits changes
the entropy H of the student's distribution by η I + O(η²) with I = A D (Theorem 1). With
A = log q_y - log p_y the advantage is A where I >= 0, and w A with w = |q_y - p_y|/(q_y + p_y)
elsewhere.

Differs from the paper:

- D = Σ_a p_a² (log p_a + H) - p_y (log p_y + H) is derived here from the statement of Theorem 1
  (dH/dz_a = -p_a (log p_a + H), and the step is A (1[a = y] - p_a)); it was not compared with the
  paper's Eq. 1, whose text was not available.
- The advantage uses the current student, also if a rollout batch serves several steps; ρ weights
  it, without a clip unless ``clip`` is set.

No code of the authors was published when this was written.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from okd_lightning.callbacks import PolicyGradientCallback
from okd_lightning.divergences import ReverseKL
from okd_lightning.losses import DrawnLogProb, DrawnOutcome, Measured, Quantity, Tile

_STUDENT, _TEACHER = DrawnLogProb("student"), DrawnOutcome("teacher", ReverseKL())


@dataclass(frozen=True)
class EntropyResponse(Quantity):
    """D: change of the student's entropy (nats) per unit of advantage on the sampled token."""

    needs_teacher = False

    @torch.no_grad()
    def measure(self, tile: Tile) -> Tensor:
        """Return [positions] nats, without gradient."""
        logprobs = tile.student_logprobs
        probs = logprobs.exp()
        finite = logprobs.masked_fill(logprobs == float("-inf"), 0.0)
        slope = probs * (finite - (probs * finite).sum(-1, keepdim=True))  # p_a (log p_a + H)
        return (probs * slope).sum(-1) - slope.gather(-1, tile.targets[:, None])[:, 0]


class IDAOPD(PolicyGradientCallback):
    """Policy gradient with log(q/p), times |q - p|/(q + p) where it would lower the entropy.

    Also logged: ``train/<name>_contracting``, the share of such tokens.

    Args:
        max_ratio: Truncation of ρ; inf for off. By default off, and 2 with ``data.rollout_lag``.
        clip: PPO's ε; None for off.
        weight: Factor on this term's mean loss.
        name: Logged as ``train/<name>``.
    """

    response = EntropyResponse()

    @property
    def quantities(self) -> tuple[Quantity, ...]:
        """Both sides' log-probabilities of the sampled token, and D."""
        return (_STUDENT, _TEACHER, self.response)

    def credit(self, measured: Measured) -> tuple[Tensor, dict[str, Tensor]]:
        """Return A, times tanh(|A|/2) = |q - p|/(q + p) where A D < 0."""
        log_ratio = (measured[_TEACHER] - measured[_STUDENT]).detach()
        contracts = log_ratio * measured[self.response] < 0
        shrunk = (log_ratio.abs() / 2).tanh() * log_ratio
        return torch.where(contracts, shrunk, log_ratio), {
            "contracting": contracts.to(log_ratio.dtype)
        }
