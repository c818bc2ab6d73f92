"""DistiLLM: skew KL, with an adaptive share of on-policy samples and their replay.

Ko et al., "DistiLLM: Towards Streamlined Distillation for Large Language Models", arXiv 2402.03898,
sections 3.1 and 3.2: a step is on-policy with probability φ, which begins at 0 and rises when the
validation loss rises; such a step generates new responses with probability 1 - t/T and else replays
earlier ones.

Differs from the paper:

- A replayed step uses the last responses to its own prompts. The paper draws prompts and responses
  from a buffer of 1000; here replay begins with the second pass over the data.
- φ is first compared with the loss of the first validation, not with the untrained student's.
- There is no language-model loss on a plain-text corpus; in the paper's GPT-2 and OPT runs there
  is. ``SFT`` on rows of such a corpus is a second run.

Differs from the released code (jongwooko/distillm, commit d47e77f):

- Its scripts train GPT-2 0.1B with the skew *forward* KL, and 0.3B and 0.7B with the skew reverse
  KL; the default here is the skew reverse KL for every size.
- It generates in every step of the share φ until its buffer is full, and replays from then on. Here
  the probability 1 - t/T applies from the start, and a prompt without a kept response is generated.
"""

from __future__ import annotations

from typing import Any

import lightning

from okd_lightning import DistillationModule, Divergence, DivergenceCallback
from okd_lightning.callbacks.methods.base import check_fraction
from okd_lightning.divergences import SkewReverseKL
from okd_lightning.engines import RolloutEngine, hashed_uniform
from okd_lightning.errors import ConfigError
from okd_lightning.rollouts import KeptResponses, ReplayEngine

_COIN = 0x5245504C  # domain separation of the replay decision


class DistiLLM(DivergenceCallback):
    """Skew reverse KL on dataset responses, and on new or replayed student responses in a share φ.

    Needs validation data, one process, and rollout batches of one optimizer step. φ, the steps at
    which it rose and the kept responses are in checkpoints.

    Args:
        divergence: Skew reverse KL with α = 0.1 by default; SkewForwardKL is the paper's other one.
        share: φ at the start.
        rise: Increase of φ, up to 1.
        tolerance: ε, nats: φ rises when val/cross_entropy exceeds the last compared one by it.
        weight: Factor on this term's mean loss.
        name: Logged as ``train/<name>``.
    """

    def __init__(
        self,
        divergence: Divergence | None = None,
        share: float = 0.0,
        rise: float = 0.1,
        tolerance: float = 0.1,
        weight: float = 1.0,
        name: str | None = None,
    ) -> None:
        chosen = divergence or SkewReverseKL(0.1)
        super().__init__(chosen, on_policy_fraction=0.5, weight=weight, name=name)
        self.share, self.rise = check_fraction("share", share), check_fraction("rise", rise)
        self.tolerance = tolerance
        self.compared: float | None = None
        self.rises: list[int] = []
        self.kept = KeptResponses()

    def share_at(self, step: int) -> float:
        """Return φ in optimizer step ``step``."""
        return min(1.0, self.share + self.rise * sum(at <= step for at in self.rises))

    def prepare(self, trainer: lightning.Trainer, module: DistillationModule, stage: str) -> None:
        """Refuse runs in which φ cannot rise, or responses cannot be replayed."""
        self._trainer = trainer
        data = getattr(trainer, "datamodule", None)
        if stage == "fit" and trainer.world_size > 1:
            raise ConfigError(f"{self.name}: responses are kept by one process; set devices 1")
        if stage == "fit" and data is not None and data.sources["val"] is None:
            raise ConfigError(
                f"{self.name}: its share follows the validation loss; give --data.val"
            )
        if stage == "fit" and data is not None and data.prompts_per_rollout is not None:
            raise ConfigError(
                f"{self.name}: its share may change after every step; leave "
                f"data.prompts_per_rollout {data.prompts_per_rollout} out"
            )
        if stage == "fit" and trainer.max_epochs == trainer.max_steps == -1:
            raise ConfigError(f"{self.name}: replay grows to the end; set max_steps or max_epochs")

    def wrap_engine(self, engine: RolloutEngine) -> RolloutEngine:
        """Return an engine that generates or replays responses."""
        return ReplayEngine(engine, self.kept, self.is_replayed)

    def on_validation_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Raise φ if the loss has risen."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        loss = float(trainer.callback_metrics["val/cross_entropy"])
        if self.compared is None:
            self.compared = loss
        elif loss >= self.compared + self.tolerance:
            self.compared = loss
            self.rises.append(trainer.global_step)

    def is_replayed(self, seed: int) -> bool:
        """Decide whether the next step replays; the same after a resume."""
        step, end = self._trainer.global_step, self._trainer.estimated_stepping_batches
        return bool(hashed_uniform(_COIN, seed, step) < step / end)

    def state_dict(self) -> dict[str, Any]:
        """Return φ's history and the kept responses."""
        history = {"compared": self.compared, "rises": list(self.rises)}
        return {**history, "kept": self.kept.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore φ's history and the kept responses."""
        self.compared, self.rises = state_dict["compared"], list(state_dict["rises"])
        self.kept.load_state_dict(state_dict["kept"])
