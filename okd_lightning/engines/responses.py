"""Responses during generation: one buffer a call, on the model's device.

Every row has ``max_new_tokens`` places. A row in a batch carries the place of its next token; a
row that has ended carries the waste place. A step is therefore the same few operations whichever
rows have ended, and nothing is copied to the host until all have. A call may take several rounds,
over rows of growing lengths.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from okd_lightning.records.requests import Response, Rollout

_UNSET = -1


class Responses:
    """The responses of a call during generation.

    Args:
        noise: [rows, max_new_tokens] float64 in (0, 1), the random number of each place.
        eos_ids: Ids that end a response.
        vocab: Number of ids that can be sampled.
        device: The model's device.
        limits: Longest response of each row, in tokens.
        merges_ends: See ``Response``.
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
        self._waste = noise.numel()
        self._noise = torch.cat([noise.flatten(), noise.new_full((1,), 0.5)]).to(device)
        self._ids = torch.full((self._waste + 1,), _UNSET, device=device)
        self._logprobs = torch.zeros(self._waste + 1, device=device)
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
            prompts: One a row.
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
        """Store one token a row.

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
        return torch.where(has_ended, self._waste, places + 1)

    def is_unfinished(self, places: Tensor) -> Tensor:
        """Return [rows], False on rows that have ended."""
        return places < self._waste

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
