"""The protocol of an engine, and of a source of engines."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol, TypeAlias

from transformers import PreTrainedModel

from okd_lightning.models import Vocabulary
from okd_lightning.records.requests import Progress, Request, Rollout
from okd_lightning.records.sampling import Sampling

ProgressFactory: TypeAlias = Callable[[str, int], AbstractContextManager[Progress | None]]
"""Creates a progress display from a description and the number of responses."""


class RolloutEngine(Protocol):
    """Engine that generates responses to any number of prompts, which it sorts and batches itself.

    A DistillationModule also implements this protocol, with the engines of both its models.
    """

    def respond(self, request: Request) -> Rollout:
        """Generate one response per prompt, in the order of the prompts."""


class EngineSource(ABC):
    """Source of the engine for the student's responses, in place of the built-in engine.

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
        """Return an engine that samples from ``model`` with its present weights.

        Args:
            model: The student, in eval mode, with its adapters.
            vocabulary: Ids outside it are never sampled.
            eos_ids: Ids that end a response.
        """

    def check_sampling(self, sampling: Sampling) -> None:
        """Refuse, before training, sampling that the engine does not support; default: none.

        Raises:
            ConfigError: Not supported; the message says what is.
        """
        del sampling

    def check_length(self, num_tokens: int) -> None:
        """Refuse, before training, sequences that are too long for the engine; default: none.

        Args:
            num_tokens: Tokens of the longest prompt with response.

        Raises:
            ConfigError: Too long; the message names both lengths.
        """
        del num_tokens
