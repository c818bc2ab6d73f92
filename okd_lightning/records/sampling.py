"""Sampling of a next token from logits: temperature, top-k and top-p, then one draw.

A draw is the inverse of the cumulative distribution at one uniform number, in the order of ids, so
that a row's token depends on its own logits and noise only. There are three passes over the
vocabulary (maximum, exponential, sums of blocks). Only the sums and the chosen block are
accumulated, in float64, so that no tail is lost to rounding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from okd_lightning.errors import ConfigError

_BLOCK = 256
"""Ids in a block, which is summed in float32."""

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

    def choose(
        self,
        logits: Tensor,
        uniform: Tensor,
        workspace: Tensor | None = None,
        end_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Sample one token a row: [rows] ids, and [rows] log-probs under the sampling distribution.

        Args:
            logits: [rows, vocab] float32; minus infinity is never sampled.
            uniform: [rows] float64 in (0, 1); not used by greedy.
            workspace: See ``draw``.
            end_ids: See ``draw``.
        """
        if self.temperature == 0:
            return logits.argmax(-1), logits.new_zeros(len(logits))
        return draw(self.warp(logits), uniform, workspace, end_ids)


def workspace_for(num_rows: int, vocab: int, device: torch.device) -> Tensor:
    """Return [rows, vocab rounded up] zeros, for repeated draws of up to ``num_rows`` rows."""
    return torch.zeros(num_rows, -(-vocab // _BLOCK) * _BLOCK, device=device)


def draw(
    logits: Tensor,
    uniform: Tensor,
    workspace: Tensor | None = None,
    end_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sample one token a row by inverse CDF.

    Args:
        logits: [rows, vocab] log-probabilities, up to a constant a row.
        uniform: [rows] float64 in (0, 1).
        workspace: From ``workspace_for`` this vocabulary; allocated if None.
        end_ids: [ends] ids that are one outcome: an end's log-probability is that of all of them
            together. None for none.

    Returns:
        [rows] ids and [rows] their log-probabilities (nats).
    """
    num_rows, vocab = logits.shape
    if workspace is None:
        workspace = workspace_for(num_rows, vocab, logits.device)
    weights = workspace[:num_rows]
    valid = weights[:, :vocab]
    torch.sub(logits, logits.amax(-1, keepdim=True), out=valid)
    valid.exp_()
    blocks = weights.view(num_rows, -1, _BLOCK)
    sums = blocks.sum(-1).double()
    ends = sums.cumsum(-1)
    block, share = _locate(ends, sums, uniform.to(ends)[:, None])
    inside = blocks.gather(1, block[:, :, None].expand(-1, 1, _BLOCK)).squeeze(1).double()
    within, _ = _locate(inside.cumsum(-1), inside, share)
    ids, mass = block * _BLOCK + within, inside.gather(1, within)
    if end_ids is not None:
        of_ends = valid.index_select(1, end_ids).double().sum(-1, keepdim=True)
        mass = torch.where((ids == end_ids).any(-1, keepdim=True), of_ends, mass)
    logprobs = (mass / ends[:, -1:]).log().to(logits.dtype)
    return ids.squeeze(1), logprobs.squeeze(1)


def _locate(ends: Tensor, widths: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Return the interval in which a number falls, and its relative position in the interval.

    Args:
        ends: [rows, intervals] float64, cumulative widths.
        widths: [rows, intervals]; an interval of width 0 is never found.
        uniform: [rows, 1] in [0, 1), as a share of the total width.

    Returns:
        [rows, 1] interval, and [rows, 1] share of it in [0, 1).
    """
    total = ends[:, -1:]
    below_total = torch.nextafter(total, torch.zeros_like(total))
    point = torch.minimum(uniform * total, below_total)
    found = torch.searchsorted(ends, point, right=True)
    width = widths.gather(1, found)
    share = (point - ends.gather(1, found) + width) / width
    return found, share.clamp(0.0, 1.0)


def _cut_below(logits: Tensor, floor: Tensor) -> Tensor:
    return logits.masked_fill(logits < floor, float("-inf"))


def _nucleus_floor(logits: Tensor, likeliest: Tensor | None, top_p: float) -> Tensor:
    """Return [rows, 1], the smallest logit in the smallest set of ids with probability ``top_p``.

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
