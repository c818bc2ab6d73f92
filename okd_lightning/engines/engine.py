"""The protocols of rollouts: an engine turns prompts into responses, a writer picks the engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, Protocol, TypeAlias

from transformers import PreTrainedModel

from okd_lightning.engines.noise import NoiseStream
from okd_lightning.engines.sampling import Sampling
from okd_lightning.models import Vocabulary
from okd_lightning.records.batches import PromptBatch, Rollout

Author: TypeAlias = Literal["student", "teacher"]


class Progress(Protocol):
    """Told while responses are written."""

    def __call__(self, rows: int, tokens: int = 0) -> None:
        """Called as often as something has happened.

        Args:
            rows: Responses that have ended since the last call.
            tokens: Tokens that were written since then, of all rows, to a few; 0 from an engine
                that does not say.
        """


ProgressFactory: TypeAlias = Callable[[str, int], AbstractContextManager[Progress | None]]
"""Description and number of responses → what shows them while they are written."""


def silent_progress(description: str, total: int) -> AbstractContextManager[None]:
    """Show nothing."""
    del description, total
    return nullcontext()


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


class EngineSource(ABC):
    """Where the student's responses are written in place of the built-in engine.

    A complete one, with which the built-in engine computes in another number format:

        class LowPrecision(EngineSource):
            def engine(self, model, vocabulary, eos_ids):
                return TransformersEngine(model, vocabulary, eos_ids, dtype=torch.bfloat16)

    ``--model.engine my_module.LowPrecision`` chooses it.
    """

    @abstractmethod
    def engine(
        self, model: PreTrainedModel, vocabulary: Vocabulary, eos_ids: tuple[int, ...]
    ) -> RolloutEngine:
        """An engine that samples from ``model`` as it is now.

        Args:
            model: The student, in eval mode, with whatever adapters it has.
            vocabulary: Ids outside it are never drawn.
            eos_ids: Ids that end a response.
        """

    def check_sampling(self, sampling: Sampling) -> None:
        """Refuse, before training, sampling that the engine does not do; by default nothing.

        Raises:
            ConfigError: Naming what it does.
        """
        del sampling

    def check_length(self, num_tokens: int) -> None:
        """Refuse, before training, what the engine has no room for; by default nothing.

        Args:
            num_tokens: The longest prompt with response.

        Raises:
            ConfigError: Naming both lengths.
        """
        del num_tokens


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
