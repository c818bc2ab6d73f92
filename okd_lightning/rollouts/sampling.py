"""How a next token is chosen from logits: transformers' warpers, then one draw by inverse CDF."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from okd_lightning.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn.

    Args:
        temperature: 1 samples from the model itself, which on-policy estimates assume; 0 takes
            the most likely token (greedy).
        top_p: Keep the smallest set of tokens with at least this probability; 1 keeps all.
        top_k: Keep this many tokens; 0 keeps all.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"sampling.temperature must be at least 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"sampling.top_p must be in (0, 1], got {self.top_p}")
        if self.top_k < 0:
            raise ConfigError(f"sampling.top_k must be at least 0 (0 keeps all), got {self.top_k}")

    @property
    def departures(self) -> tuple[str, ...]:
        """In what way, if any, tokens are not drawn from the model itself."""
        found = {
            f"sampling.temperature {self.temperature}": self.temperature != 1,
            f"sampling.top_p {self.top_p}": self.top_p < 1,
            f"sampling.top_k {self.top_k}": self.top_k > 0,
        }
        return tuple(name for name, is_set in found.items() if is_set)

    def logprobs(self, logits: Tensor) -> Tensor:
        """[rows, vocab] logits → log-probabilities (nats) that the draw is made from."""
        if self.temperature == 0:
            best = logits.argmax(-1, keepdim=True)
            return torch.full_like(logits, float("-inf")).scatter(-1, best, 0.0)
        warpers = LogitsProcessorList()
        if self.temperature != 1:
            warpers.append(TemperatureLogitsWarper(float(self.temperature)))
        if self.top_k:
            warpers.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            warpers.append(TopPLogitsWarper(self.top_p))
        return warpers(None, logits).log_softmax(-1)  # type: ignore[arg-type]


def draw(logprobs: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """One token a row by inverse CDF.

    Args:
        logprobs: [rows, vocab] nats.
        uniform: [rows] in (0, 1).

    Returns:
        [rows] ids and [rows] their log-probabilities.
    """
    cdf = logprobs.double().exp().cumsum(-1)
    threshold = uniform[:, None].to(cdf) * cdf[:, -1:]
    ids = torch.searchsorted(cdf, threshold, right=True).clamp(max=logprobs.shape[-1] - 1)
    return ids.squeeze(-1), logprobs.gather(-1, ids).squeeze(-1)
