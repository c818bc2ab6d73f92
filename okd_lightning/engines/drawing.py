"""Sampling of one token per row, from a model's logits or from several models', into the responses.

The responses of a call are one buffer on the model's device. Every row has ``max_new_tokens``
places. A row in a batch carries the place of its next token; a row that has ended carries the waste
place. A step is therefore the same few operations whichever rows have ended, and nothing is copied
to the host until all have. A call may take several rounds, over rows of growing lengths.

A draw is the inverse of the cumulative distribution at one uniform number, in the order of ids, so
that a row's token depends on its own logits and noise only. There are three passes over the
vocabulary (maximum, exponential, sums of blocks). Only the sums and the chosen block are
accumulated, in float64, so that no tail is lost to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from okd_lightning.models import Vocabulary
from okd_lightning.records.requests import Response, Rollout
from okd_lightning.records.sampling import Sampling

_UNSET = -1

_BLOCK = 256
"""Ids in a block, which is summed in float32."""


def workspace_for(num_rows: int, vocab: int, device: torch.device) -> Tensor:
    """Return [rows, vocab rounded up] zeros, for repeated draws of up to ``num_rows`` rows."""
    return torch.zeros(num_rows, -(-vocab // _BLOCK) * _BLOCK, device=device)


def draw(
    logits: Tensor,
    uniform: Tensor,
    workspace: Tensor | None = None,
    end_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sample one token per row by inverse CDF.

    Args:
        logits: [rows, vocab] log-probabilities, up to a constant per row.
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


class Responses:
    """The responses of a call during generation.

    Args:
        noise: [rows, max_new_tokens] float64 in (0, 1), the random number of each place.
        eos_ids: Ids that end a response.
        vocab: Number of ids that can be sampled.
        device: The model's device.
        limits: Longest response of each row, in tokens.
        merges_ends: See ``Response``.

    Attributes:
        waste: Place of rows that have ended; the others have smaller ones.
    """

    def __init__(
        self,
        noise: Tensor,
        eos_ids: Sequence[int],
        vocab: int,
        device: torch.device,
        limits: Sequence[int],
        merges_ends: bool = False,
    ) -> None:
        self._num_rows, self._max_new_tokens = noise.shape
        self._eos_ids = eos_ids
        self._merges_ends = merges_ends
        self._limits = list(limits)
        self._num_rounds = 0
        self._begun = [0] * self._num_rows  # tokens of each row before the present round
        self._ends = self._limits  # and at its end
        self.waste = noise.numel()
        self._noise = torch.cat([noise.flatten(), noise.new_full((1,), 0.5)]).to(device)
        self._ids = torch.full((self.waste + 1,), _UNSET, device=device)
        self._logprobs = torch.zeros(self.waste + 1, device=device)
        self._is_end = torch.zeros(vocab, dtype=torch.bool, device=device)
        self._is_end[[i for i in eos_ids if i < vocab]] = True

    def next_places(self, rows: Sequence[int]) -> Tensor:
        """Return [rows] place of each row's first token in this round."""
        places = [row * self._max_new_tokens + self._begun[row] for row in rows]
        return torch.tensor(places, dtype=torch.int64, device=self._ids.device)

    def last_places(self, rows: Sequence[int]) -> Tensor:
        """Return [rows] place of the last token that each row may have in this round."""
        places = [row * self._max_new_tokens + self._ends[row] - 1 for row in rows]
        return torch.tensor(places, dtype=torch.int64, device=self._ids.device)

    def begin_round(
        self, prompts: Sequence[tuple[int, ...]], longest: int | None
    ) -> dict[int, tuple[int, ...]]:
        """Begin a round and return the unfinished rows that are not too long for it.

        Args:
            prompts: One per row.
            longest: Most tokens of a row in a pass of this round; None for any number.

        Returns:
            Prompt and response so far, by row number.
        """
        sampled = self._sampled() if self._num_rounds else [()] * self._num_rows
        self._num_rounds += 1
        self._begun = [len(ids) for ids in sampled]
        open_rows = [
            row
            for row, ids in enumerate(sampled)
            if len(ids) < self._limits[row] and not (ids and ids[-1] in self._eos_ids)
        ]
        texts = {row: prompts[row] + sampled[row] for row in open_rows}
        if longest is None:
            self._ends = self._limits
            return texts
        self._ends = [
            min(limit, longest - len(prompt) + 1)  # the last pass samples one more
            for limit, prompt in zip(self._limits, prompts, strict=True)
        ]
        return {row: text for row, text in texts.items() if len(text) <= longest}

    def num_ended(self) -> int:
        """Return the number of rows that have ended."""
        return sum(
            len(ids) >= limit or bool(ids and ids[-1] in self._eos_ids)
            for ids, limit in zip(self._sampled(), self._limits, strict=True)
        )

    def noise(self, places: Tensor) -> Tensor:
        """Return [rows] float64 random numbers of these places."""
        return self._noise.index_select(0, places)

    def store(self, places: Tensor, ids: Tensor, logprobs: Tensor, last: Tensor) -> Tensor:
        """Store one token per row.

        Args:
            places: [rows] place of each token.
            ids: [rows] the sampled ids.
            logprobs: [rows] their log-probabilities (nats).
            last: [rows] see ``last_places``.

        Returns:
            [rows] place of each row's next token; the waste place once the row has ended.
        """
        self._ids.index_copy_(0, places, ids)
        self._logprobs.index_copy_(0, places, logprobs.float())
        has_ended = self._is_end.index_select(0, ids) | (places >= last)
        return torch.where(has_ended, self.waste, places + 1)

    def rollout(self, num_row_steps: int) -> Rollout:
        """Return all responses, in the order of the rows.

        Args:
            num_row_steps: Rows summed over all forward passes of the generation.
        """
        shape = (self._num_rows, self._max_new_tokens)
        logprobs = self._logprobs[:-1].view(shape).tolist()
        responses = tuple(
            Response(
                ids=ids,
                logprobs=tuple(row[: len(ids)]),
                stop_reason="eos" if ids and ids[-1] in self._eos_ids else "length",
                merges_ends=self._merges_ends,
            )
            for ids, row in zip(self._sampled(), logprobs, strict=True)
        )
        return Rollout(responses, num_row_steps)

    def _sampled(self) -> list[tuple[int, ...]]:
        """Return the response ids of each row so far."""
        ids = self._ids[:-1].view(self._num_rows, self._max_new_tokens)
        lengths = (ids != _UNSET).sum(-1).tolist()
        return [tuple(row[:n]) for row, n in zip(ids.tolist(), lengths, strict=True)]


class DrawnFrom(Protocol):
    """Further models that form one distribution with the engine's own."""

    @property
    def models(self) -> tuple[PreTrainedModel, ...]:
        """The further models, of the same tokenizer, in eval mode."""

    def mix(self, *logits: Tensor) -> Tensor:
        """Return [rows, vocab] logits of the distribution, from those of each model."""


@dataclass(frozen=True)
class MixedDraws:
    """Function of all models' logits, from whose result every token is sampled.

    Attributes:
        models: The further models.
        mixing: Function from each model's [rows, vocab] logits to those of the distribution.
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
        self._is_greedy = sampling.temperature == 0
        is_plain = (sampling.temperature, sampling.top_p, sampling.top_k) == (1, 1, 0)
        self._warp = None if is_plain else sampling.warp  # plain: the model's own distribution
        self._vocabulary = vocabulary
        self._blend = blend
        self._device = device
        self._workspace = workspace_for(0, vocabulary.size, device)
        ends = vocabulary.end_ids
        self._end_ids = torch.tensor(ends, device=device) if len(ends) > 1 else None

    def draw(
        self, tables: Sequence[Tensor], places: Tensor, last: Tensor, index: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Sample one token per row.

        Args:
            tables: [rows, table] head outputs of each model.
            places: [rows] place of the token in the responses.
            last: [rows] see ``Responses.last_places``.
            index: [rows] row of ``tables`` for each row; None for the same row.

        Returns:
            [rows] place of the next token, and [rows] ids.
        """
        found = [table.float()[..., : self._vocabulary.size] for table in tables]
        if self._vocabulary.invalid_ids:
            found = [self._vocabulary.cut(logits) for logits in found]
        logits = found[0] if self._blend is None else self._blend.mix(*found)
        if index is not None:
            logits = logits[index]
        ids, logprobs = self._choose(logits, places)
        return self.responses.store(places, ids, logprobs, last), ids

    def _choose(self, logits: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """Return [rows] ids, and [rows] their log-probabilities under the sampling distribution."""
        if self._is_greedy:
            return logits.argmax(-1), logits.new_zeros(len(logits))
        if len(self._workspace) < len(logits):
            self._workspace = workspace_for(len(logits), self._vocabulary.size, self._device)
        if self._warp is not None:
            logits = self._warp(logits)
        return draw(logits, self.responses.noise(places), self._workspace, self._end_ids)
