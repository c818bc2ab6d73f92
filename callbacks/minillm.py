"""MiniLLM: reverse KL of whole responses by policy gradient with variance reduction.

Gu et al., "MiniLLM: Knowledge Distillation of Large Language Models", arXiv 2306.08543, Eqs. 3-7:
the exact gradient of every single step; the reward-to-go after it, normalised by its length;
sampling from a mixture with the teacher, with the importance weight w = p/(α q + (1-α) p) of the
sampled token; PPO's clip; and a language-model loss, divided by its own tokens.

Differs from the paper:

- The mean of the later rewards is over their number (Eq. 6 divides by one less).
- The language-model loss is on dataset responses, which are half of every optimizer step, instead
  of a pretraining corpus.
- Rewards use the current student, not the one at rollout time. Both are equal if a rollout batch
  serves one optimizer step.

Differs from the released code (microsoft/LMOps, commit 4f2a9de, folder minillm; its GPT-2 scripts):

- It divides rewards by 0.5 and clips them to ±100 (``reward_scale: 2.0`` gives the first), and
  whitens the advantages of a batch, which is left out.
- It takes the mean of the token's own reward and the later ones (``counts_own: true``), with a
  discount of 0.95 a token, the default of its ``--gamma``.
- It does not weight the single-step gradient by w; the paper's Eq. 7 and this file do.
- Its loss on the corpus is half cross-entropy and half the teacher's (``lm_kd: 0.5``, which is half
  forward KL and has the same gradient).
- It does 4 epochs of PPO over a rollout batch. ``data.prompts_per_rollout`` gives several steps
  over one rollout batch, but one epoch only.
"""

from __future__ import annotations

import lightning
import torch
from torch import Tensor

from okd_lightning import DistillationCallback, DistillationModule, DivergenceCallback
from okd_lightning.advantages import reward_to_go
from okd_lightning.callbacks import SFT
from okd_lightning.callbacks.methods.base import check_fraction
from okd_lightning.callbacks.methods.policy_gradient import Rows
from okd_lightning.divergences import ReverseKL
from okd_lightning.engines import RolloutEngine
from okd_lightning.errors import ConfigError
from okd_lightning.losses import (
    DrawnLogProb,
    DrawnOutcome,
    ExactDivergence,
    ImportanceRatio,
    Measured,
)
from okd_lightning.losses.reduction import loss_output
from okd_lightning.records.batches import LossOutput, Source
from okd_lightning.training.generation import MixtureEngine

_STUDENT, _TEACHER = DrawnLogProb("student"), DrawnOutcome("teacher", ReverseKL())
_SINGLE = ExactDivergence(ReverseKL())


class MiniLLM(DistillationCallback):
    """w KL(p‖q) - clipped w R on the student's rows, and CE on dataset rows, as in SFT.

    R is the mean of log q - log p over the tokens after the token, 0 at the last. Gradient flows to
    the student through the KL and the clipped ratio; w before the KL and R are constants. The
    cross-entropy is a separate term, ``train/<name>_lm``. Teacher and student must read the same
    prompts.

    Args:
        teacher_share: α of the mixture from which responses are sampled, in [0, 1).
        clip: PPO's ε on w; None for off.
        lm_weight: Factor on the cross-entropy; 0 for none, and for no dataset responses.
        weight: Factor on this term's mean loss.
        name: Logged as ``train/<name>``.
        reward_scale: Factor on R.
        counts_own: R is the mean over the token and those after it.
        lm_kd: Share of forward KL to the teacher in the language-model loss, in [0, 1).
    """

    is_positionwise = False
    sources: tuple[Source, ...] = ("student",)
    on_policy_fraction: float | None = 1.0
    quantities = (_STUDENT, _TEACHER, _SINGLE)

    def __init__(
        self,
        teacher_share: float = 0.2,
        clip: float | None = 0.2,
        lm_weight: float = 1.0,
        weight: float = 1.0,
        name: str | None = None,
        reward_scale: float = 1.0,
        counts_own: bool = False,
        lm_kd: float = 0.0,
    ) -> None:
        super().__init__(weight, name)
        if not 0 <= teacher_share < 1:
            raise ConfigError(f"MiniLLM: teacher_share must be in [0, 1), got {teacher_share}")
        if not lm_weight >= 0:
            raise ConfigError(f"MiniLLM: lm_weight must be a number from 0 on, got {lm_weight}")
        if not reward_scale > 0:
            raise ConfigError(f"MiniLLM: reward_scale must be above 0, got {reward_scale}")
        if check_fraction("lm_kd", lm_kd) == 1 or (lm_kd and not lm_weight):
            raise ConfigError(
                f"MiniLLM: lm_kd is {lm_kd} with lm_weight {lm_weight}; expected a share below 1 "
                "of a language-model loss whose weight is above 0"
            )
        self.teacher_share, self.lm_weight = teacher_share, lm_weight
        self.reward_scale, self.counts_own = reward_scale, counts_own
        self.ratio = ImportanceRatio(clip=clip)
        about = {"weight": weight * lm_weight, "name": f"{self.name}_lm"}
        if lm_kd:
            self.further_terms = (DivergenceCallback(cross_entropy_weight=1 - lm_kd, **about),)
        elif lm_weight:
            self.further_terms = (SFT(**about),)

    def prepare(self, trainer: lightning.Trainer, module: DistillationModule, stage: str) -> None:
        """Keep the module whose models are mixed; refuse separate teacher prompts."""
        self._module = module
        if getattr(getattr(trainer, "datamodule", None), "teacher_prompts", None) is not None:
            raise ConfigError(
                f"{self.name}: teacher and student draw together and must read the "
                "same prompts; leave the teacher's prompts out"
            )

    def wrap_engine(self, engine: RolloutEngine) -> RolloutEngine:
        """Return an engine that samples the student's responses from the mixture."""
        share = self.teacher_share
        return MixtureEngine(self._module, share, engine) if share else engine

    def loss(self, measured: Measured) -> LossOutput:
        """Return the sum over the student's rows, in nats."""
        own = measured.mask(("student",))
        logprobs = measured[_STUDENT]
        sampler = measured.sampler_logprobs.to(logprobs.dtype).where(own, logprobs.detach())
        rewards = (measured[_TEACHER] - logprobs).detach().where(own, 0.0)
        weights = (logprobs.detach() - sampler).exp()
        to_come = self.reward_scale * self.rewards_to_come(rewards, own, measured.row)
        values = weights * measured[_SINGLE] + self.ratio.loss(logprobs, sampler, to_come)
        return loss_output(values, own)

    def rewards_to_come(self, rewards: Tensor, own: Tensor, row: Tensor) -> Tensor:
        """Return [positions], the mean reward after each token of its response, or from it on."""
        rows = Rows(row, own, is_split=True)
        split = rows.split(rewards)
        total = reward_to_go(split, rows.mask, 1.0)
        number = reward_to_go(torch.ones_like(split), rows.mask, 1.0)
        if not self.counts_own:
            total, number = total - split, number - 1
        return rows.join(total / number.clamp(min=1))
