"""OPD²: on-policy distillation of the change that post-training made to the teacher.

Heo et al., "On-Policy Delta Distillation", arXiv 2607.15161, section 4: with teacher q, its base
q₀ from before its post-training, and A the advantages centred under the student p,

    A_delta = log(q/q₀) - E_p[log(q/q₀)],    A_opd = log(q/p) - E_p[log(q/p)],

a sampled token's advantage is A_delta where both have one sign, and 0 elsewhere. The first alone
would drive p to the id with the largest shift; with the gate no token is driven away from q.

Differs from the paper:

- Expectations run over the whole vocabulary; the paper's over the student's 1,024 most likely ids.
- Temperature 1 in rollouts and softmaxes; the paper has 0.7 in both.
- The paper multiplies advantages by 0.1 and optimises PPO's clipped loss of TRL's ``GRPOTrainer``;
  here ``weight`` and ``clip`` do, by default 1 and off.
- The advantage is of the current student, also where a rollout batch serves several steps.

Differs from the released code (naver-ai/opd2): that repository could not be read. What is known of
it is a transcription, in a port to verl: ``log_softmax`` is in bfloat16, the sampled id replaces
the last of the top 1,024 where it is not among them, and those probabilities are not normalised.
There, as here, a token that the teacher rules out counts 0. The paper's text was read in two
summaries, which agree on every formula above.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import lightning
import torch
from torch import Tensor

from okd_lightning import DistillationModule
from okd_lightning.callbacks import PolicyGradientCallback
from okd_lightning.losses import Measured, Quantity, Tile


@dataclass(frozen=True)
class CentredLogRatio(Quantity):
    """log(q/r) of the sampled token minus its mean under the student, nats, without gradient."""

    reference: Literal["student", "base"]
    needs_teacher = True

    @property
    def needs_base_teacher(self) -> bool:  # type: ignore[override]
        """Return whether the reference is the base."""
        return self.reference == "base"

    @torch.no_grad()
    def measure(self, tile: Tile) -> Tensor:
        """[positions]; ids that the teacher rules out, such as padding of the table, count 0."""
        is_base = self.reference == "base"
        teacher, student = tile.teacher_logprobs, tile.student_logprobs
        ratio = teacher - (tile.base_logprobs if is_base else student)
        ratio = ratio.masked_fill(teacher == float("-inf"), 0.0)
        return ratio.gather(-1, tile.targets[:, None])[:, 0] - (student.exp() * ratio).sum(-1)


class DeltaOPD(PolicyGradientCallback):
    """Policy gradient with the centred log(q/q₀) where the centred log(q/p) has its sign.

    Logged besides: ``train/<name>_kept``, the share of such tokens.

    Args:
        teacher_base: Folder or hub id of the teacher's base, q₀.
        max_ratio: Truncation of ρ; inf for off. By default off, and 2 with ``data.rollout_lag``.
        clip: PPO's ε; None for off.
        weight: Factor on this term's mean loss.
        name: Logged as ``train/<name>``.
    """

    shift, gap = CentredLogRatio("base"), CentredLogRatio("student")

    def __init__(
        self,
        teacher_base: str,
        max_ratio: float | None = None,
        clip: float | None = None,
        weight: float = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__(max_ratio, clip, weight, name)
        self.teacher_base = teacher_base

    @property
    def quantities(self) -> tuple[Quantity, ...]:
        """The student's log-prob of the sampled token, and both centred ratios."""
        return (*super().quantities, self.shift, self.gap)

    def prepare(self, trainer: lightning.Trainer, module: DistillationModule, stage: str) -> None:
        """Add the teacher's base, which only training needs."""
        super().prepare(trainer, module, stage)
        if stage == "fit":
            module.add_teacher_base(self.teacher_base, "--method.teacher_base")

    def credit(self, measured: Measured) -> tuple[Tensor, dict[str, Tensor]]:
        """A_delta, or 0."""
        shift = measured[self.shift]
        is_kept = shift * measured[self.gap] > 0
        return shift.where(is_kept, 0.0), {"kept": is_kept.to(shift.dtype)}
