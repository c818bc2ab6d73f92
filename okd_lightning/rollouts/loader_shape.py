"""Division of an epoch into optimizer steps, rollout batches and micro-batches."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from okd_lightning.errors import ConfigError


@dataclass(frozen=True)
class LoaderShape:
    """Division of an epoch: all numbers that determine the rows of an optimizer step.

    Attributes:
        batch_size: Sequences per micro-batch on one rank.
        accumulate_grad_batches: Micro-batches per optimizer step.
        world_size: Ranks.
        rank: This rank.
        prompts_per_epoch: Prompts per epoch, over all ranks.
        prompts_per_rollout: Prompts per rollout batch; None for those of one optimizer step.
        samples_per_prompt: Responses generated to each prompt.
    """

    batch_size: int
    prompts_per_epoch: int
    accumulate_grad_batches: int = 1
    world_size: int = 1
    rank: int = 0
    prompts_per_rollout: int | None = None
    samples_per_prompt: int = 1

    def __post_init__(self) -> None:
        if self.rows_per_step % self.samples_per_prompt:
            raise ConfigError(
                f"data.samples_per_prompt {self.samples_per_prompt} must divide the rows of an "
                f"optimizer step, {self.rows_per_step} (batch_size x accumulation x ranks)"
            )
        chunk = self.prompts_per_rollout or self.prompts_per_step
        if chunk % self.prompts_per_step:
            raise ConfigError(
                f"data.prompts_per_rollout {chunk} must be a whole number of optimizer steps, "
                f"which take {self.prompts_per_step} prompts each"
            )

    @cached_property
    def rows_per_step(self) -> int:
        """Sequences per optimizer step, over all ranks."""
        return self.batch_size * self.accumulate_grad_batches * self.world_size

    @cached_property
    def prompts_per_step(self) -> int:
        """Prompts per optimizer step, over all ranks."""
        return self.rows_per_step // self.samples_per_prompt

    @cached_property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch; the last one is short if the prompts do not fill it."""
        return -(-self.prompts_per_epoch // self.prompts_per_step)

    @cached_property
    def steps_per_rollout(self) -> int:
        """Optimizer steps per rollout batch."""
        return (self.prompts_per_rollout or self.prompts_per_step) // self.prompts_per_step

    @cached_property
    def rollouts_per_epoch(self) -> int:
        """Rollout batches per epoch."""
        return -(-self.steps_per_epoch // self.steps_per_rollout)
