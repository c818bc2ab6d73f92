"""The protocols of rollouts: an engine turns prompts into responses, a writer picks the engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol, TypeAlias

from okd_lightning.records import PromptBatch, Rollout
from okd_lightning.rollouts.noise import NoiseStream
from okd_lightning.rollouts.sampling import Sampling

Author: TypeAlias = Literal["student", "teacher"]

Progress: TypeAlias = Callable[[int], None]
"""Called with the number of rows that have just been finished."""


class RolloutEngine(Protocol):
    """Writes responses to any number of prompts; batching and sorting are its own business."""

    def generate(
        self,
        prompts: PromptBatch,
        sampling: Sampling,
        generator: NoiseStream,
        max_new_tokens: int,
        progress: Progress | None = None,
    ) -> Rollout:
        """One response a prompt, in the order of the prompts.

        Args:
            prompts: What to continue; rows with ``limits`` of their own are cut there.
            sampling: How tokens are chosen; the rollout's log-probs are under this distribution.
            generator: The noise, keyed by (seed, epoch, prompt, sample, position) alone.
            max_new_tokens: Cut a response here; a cut response has no end-of-sequence id.
            progress: Told about finished rows.
        """


class Writer(Protocol):
    """Who a RolloutLoader asks for responses: the module, which knows both models' engines."""

    def write(
        self,
        author: Author,
        prompts: PromptBatch,
        sampling: Sampling,
        generator: NoiseStream,
        max_new_tokens: int,
        progress: Progress | None = None,
    ) -> Rollout:
        """Responses by one of the models; see ``RolloutEngine.generate``."""
