"""Task accuracy: greedy answers against the references."""

from __future__ import annotations

from typing import Any

import lightning
import torch

from okd_lightning.answers import answer_pattern, matches
from okd_lightning.callbacks.evaluation import EvaluationCallback
from okd_lightning.data import RolloutDataModule
from okd_lightning.errors import ConfigError
from okd_lightning.module import DistillationModule
from okd_lightning.records import Example
from okd_lightning.rollouts import NoiseStream, Sampling
from okd_lightning.rollouts.engine import Author
from okd_lightning.rollouts.evaluation import prompt_batch
from okd_lightning.rollouts.rows import share


class ExactMatch(EvaluationCallback):
    """Logs ``val/exact_match`` and ``test/exact_match``: the share of prompts that are solved.

    The student answers greedily; the answer and the data set's response are compared after
    ``pattern`` has cut the final answer out of either. Where it calls tools (``data.tools``), its
    last turn is the answer: neither a tool's result nor an earlier turn counts.

    Args:
        pattern: A regular expression whose first group is the answer (the last match counts), such
            as '#### (.+)'; None compares whole responses.
        num_prompts: How many prompts of the set, from its start; None for all.
    """

    def __init__(self, pattern: str | None = None, num_prompts: int | None = None) -> None:
        self.pattern = answer_pattern(pattern)
        self.num_prompts = num_prompts

    def _log(self, trainer: lightning.Trainer, pl_module: Any, part: str) -> None:
        assert isinstance(pl_module, DistillationModule)
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, RolloutDataModule):
            raise ConfigError("ExactMatch reads its prompts from a RolloutDataModule")
        examples = [e for e in data.examples(part).examples if e.response][: self.num_prompts]
        if not examples:
            raise ConfigError(
                f"ExactMatch has nothing to compare with: no row of --data.{part} has a response"
            )
        own = list(share(examples, trainer.global_rank, trainer.world_size))
        solved = sum(
            matches(answer, example.response, self.pattern)
            for answer, example in zip(greedy_answers(pl_module, data, own), own, strict=True)
        )
        counts = torch.tensor([solved, len(own)], device=pl_module.device, dtype=torch.float32)
        total = trainer.strategy.reduce(counts, reduce_op="sum")
        pl_module.log(
            f"{part}/exact_match",
            total[0] / total[1],
            prog_bar=True,
            batch_size=1,
            sync_dist=True,  # the same on all ranks, and on all of them for "best"
        )


def greedy_answers(
    module: DistillationModule,
    data: RolloutDataModule,
    examples: list[Example],
    author: Author = "student",
) -> list[str]:
    """The most likely responses (their last turns) of the student or the teacher, as text."""
    rollout = module.write(
        author,
        prompt_batch(examples, author),
        Sampling(temperature=0),
        NoiseStream(0, 0),
        data.max_response_length,
    )
    return [module.decode(rollout.turns(row)[-1]) for row in range(len(rollout))]
