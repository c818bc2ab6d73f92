"""The distribution from which a next token is sampled: temperature, top-k and top-p."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from okd_lightning.errors import ConfigError

_NUCLEUS = 1024
"""Most likely ids that are sorted for top-p; the whole vocabulary is sorted if they are too few."""


@dataclass(frozen=True)
class Sampling:
    """Sampling settings of responses.

    Args:
        temperature: 1 samples from the model itself; 0 takes the most likely token (greedy).
        top_p: Keep the smallest set of tokens with at least this probability, and ties with its
            last one; 1 keeps all.
        top_k: Keep this many tokens, and ties with the last one; 0 keeps all.
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
    def support_cuts(self) -> tuple[str, ...]:
        """Settings, if any, that exclude some tokens from sampling.

        A temperature above 0 is not one: the stored log-probabilities are the tempered ones, so
        that an importance ratio corrects for it.
        """
        found = {
            f"sampling.temperature {self.temperature:g} (greedy)": self.temperature == 0,
            f"sampling.top_p {self.top_p}": self.top_p < 1,
            f"sampling.top_k {self.top_k}": self.top_k > 0,
        }
        return tuple(name for name, is_set in found.items() if is_set)

    def warp(self, logits: Tensor) -> Tensor:
        """[rows, vocab] logits → logits of the sampling distribution."""
        if self.temperature == 0:
            best = logits.argmax(-1, keepdim=True)
            return torch.full_like(logits, float("-inf")).scatter_(-1, best, 0.0)
        if self.temperature != 1:
            logits = logits / self.temperature
        kept = None
        if self.top_k:
            kept = logits.topk(min(self.top_k, logits.shape[-1])).values
            logits = _cut_below(logits, kept[:, -1:])
        if self.top_p < 1:
            logits = _cut_below(logits, _nucleus_floor(logits, kept, self.top_p))
        return logits

    def logprobs(self, logits: Tensor) -> Tensor:
        """[rows, vocab] logits → log-probabilities (nats) of the sampling distribution."""
        return self.warp(logits).log_softmax(-1)


def _cut_below(logits: Tensor, floor: Tensor) -> Tensor:
    return logits.masked_fill(logits < floor, float("-inf"))


def _nucleus_floor(logits: Tensor, likeliest: Tensor | None, top_p: float) -> Tensor:
    """Return each row's smallest logit that top-p sampling keeps, as [rows, 1].

    Top-p sampling keeps the fewest ids whose probabilities sum to ``top_p``.

    Args:
        logits: [rows, vocab].
        likeliest: [rows, any] the largest logits, descending, if all others are -inf; else None.
        top_p: Below 1.
    """
    total = logits.double().logsumexp(-1, keepdim=True)
    if likeliest is None:
        likeliest = logits.topk(min(_NUCLEUS, logits.shape[-1])).values
        if not bool(((likeliest.double() - total).exp().sum(-1) >= top_p).all()):
            likeliest = logits.sort(-1, descending=True).values
    probs = (likeliest.double() - total).exp()
    before = functional.pad(probs.cumsum(-1)[:, :-1], (1, 0))
    last = (before < top_p).sum(-1, keepdim=True) - 1
    return likeliest.gather(-1, last)
