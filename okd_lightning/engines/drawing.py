"""Sampling of one token a row, from a model's logits or from several models'."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from okd_lightning.engines.responses import Responses
from okd_lightning.models import Vocabulary
from okd_lightning.records.sampling import Sampling, workspace_for


class DrawnFrom(Protocol):
    """Further models, with which an engine's own is one distribution."""

    @property
    def models(self) -> tuple[PreTrainedModel, ...]:
        """The further models, of the same tokenizer, in eval mode."""

    def mix(self, *logits: Tensor) -> Tensor:
        """Return [rows, vocab] logits of the distribution, from those of each model."""


@dataclass(frozen=True)
class MixedDraws:
    """A function of all models' logits, from which every token is sampled.

    Attributes:
        models: The further models.
        mixing: From each model's [rows, vocab] logits to those of the distribution.
    """

    models: tuple[PreTrainedModel, ...]
    mixing: Callable[[Sequence[Tensor]], Tensor]

    def mix(self, *logits: Tensor) -> Tensor:
        """Return [rows, vocab] logits of the distribution."""
        return self.mixing(logits)


@dataclass(frozen=True)
class Blend:
    """A second model whose distribution is mixed into every draw (arXiv 2306.08543, Eq. 4).

    Attributes:
        model: The second causal LM, of the same tokenizer, in eval mode.
        share: α of α q + (1-α) p, strictly between 0 and 1; q is this model's.
    """

    model: PreTrainedModel
    share: float

    @property
    def models(self) -> tuple[PreTrainedModel, ...]:
        """The second model."""
        return (self.model,)

    def mix(self, logits: Tensor, second: Tensor) -> Tensor:
        """Return [rows, vocab] log-probabilities (nats) of the mixture."""
        first = logits.log_softmax(-1) + math.log1p(-self.share)
        return torch.logaddexp(first, second.log_softmax(-1) + math.log(self.share))


class Drawing:
    """Samples tokens and stores them in the responses of a call.

    Args:
        responses: The responses.
        sampling: Temperature, top-k and top-p.
        vocabulary: Ids outside it are never sampled; its end ids are one outcome, whose
            log-probability is stored with whichever of them is sampled.
        blend: Further models that are mixed in; None for one model.
        device: Device of the logits.
    """

    def __init__(
        self,
        responses: Responses,
        sampling: Sampling,
        vocabulary: Vocabulary,
        blend: DrawnFrom | None,
        device: torch.device,
    ) -> None:
        self.responses = responses
        self._sampling = sampling
        self._vocabulary = vocabulary
        self._blend = blend
        self._device = device
        self._workspace = workspace_for(0, vocabulary.size, device)
        ends = vocabulary.end_ids
        self._end_ids = torch.tensor(ends, device=device) if len(ends) > 1 else None

    def draw(
        self, tables: Sequence[Tensor], places: Tensor, last: Tensor, index: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Sample one token a row.

        Args:
            tables: [rows, table] head outputs of each model.
            places: [rows] place of the token in the responses.
            last: [rows] see ``Responses.last_places``.
            index: [rows] row of ``tables`` for each row; None for the same row.

        Returns:
            [rows] place of the next token, and [rows] ids.
        """
        found = [self._vocabulary.cut(table.float()) for table in tables]
        logits = found[0] if self._blend is None else self._blend.mix(*found)
        if index is not None:
            logits = logits[index]
        if len(self._workspace) < len(logits):
            self._workspace = workspace_for(len(logits), self._vocabulary.size, self._device)
        noise = self.responses.noise(places)
        ids, logprobs = self._sampling.choose(logits, noise, self._workspace, self._end_ids)
        return self.responses.store(places, ids, logprobs, last), ids
