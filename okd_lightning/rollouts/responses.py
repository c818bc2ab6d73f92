"""Responses while they are being written: one buffer a call, on the model's device.

Every row has ``max_new_tokens`` places; a row in a batch carries the place of its next token, and a
row that has ended carries the waste place, so that a step is the same few operations whichever rows
are still writing, and nothing is copied to the host until all have ended.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from okd_lightning.records import Rollout

_UNWRITTEN = -1


class Responses:
    """What has been written of a call.

    Args:
        noise: [rows, max_new_tokens] float64 in (0, 1), what each place is drawn with.
        eos_ids: Ids that end a response.
        vocab: Ids that can be drawn.
        device: Where the model is.
        limits: Longest response of each row, in tokens; () for ``max_new_tokens`` everywhere.
    """

    def __init__(
        self,
        noise: Tensor,
        eos_ids: Sequence[int],
        vocab: int,
        device: torch.device,
        limits: Sequence[int] = (),
    ) -> None:
        self._num_rows, self._max_new_tokens = noise.shape
        self._eos_ids = eos_ids
        self._limits = limits
        self._waste = noise.numel()
        self._noise = torch.cat([noise.flatten(), noise.new_full((1,), 0.5)]).to(device)
        self._ids = torch.full((self._waste + 1,), _UNWRITTEN, device=device)
        self._logprobs = torch.zeros(self._waste + 1, device=device)
        self._is_end = torch.zeros(vocab, dtype=torch.bool, device=device)
        self._is_end[[i for i in eos_ids if i < vocab]] = True

    def first_places(self, rows: Sequence[int]) -> Tensor:
        """[rows] place of each row's first token."""
        return torch.tensor(rows, device=self._ids.device) * self._max_new_tokens

    def last_places(self, rows: Sequence[int]) -> Tensor:
        """[rows] place of the last token that each row may have."""
        longest = self._max_new_tokens
        last = [
            min(self._limits[row], longest) - 1 if self._limits else longest - 1 for row in rows
        ]
        return self.first_places(rows) + torch.tensor(last, device=self._ids.device)

    def noise(self, places: Tensor) -> Tensor:
        """[rows] float64 for the tokens of these places."""
        return self._noise.index_select(0, places)

    def write(self, places: Tensor, ids: Tensor, logprobs: Tensor, last: Tensor) -> Tensor:
        """Store one token a row.

        Args:
            places: [rows] where.
            ids: [rows] what was drawn.
            logprobs: [rows] with which log-probability.
            last: [rows] see ``last_places``.

        Returns:
            [rows] where each row's next token goes: the waste place once the row has ended.
        """
        self._ids.index_copy_(0, places, ids)
        self._logprobs.index_copy_(0, places, logprobs.float())
        has_ended = self._is_end.index_select(0, ids) | (places >= last)
        return torch.where(has_ended, self._waste, places + 1)

    def is_writing(self, places: Tensor) -> Tensor:
        """[rows] False on rows that have ended."""
        return places < self._waste

    def rollout(self, num_row_steps: int) -> Rollout:
        """All responses, in the order of the rows.

        Args:
            num_row_steps: Rows of all forward passes, which the writing took.
        """
        shape = (self._num_rows, self._max_new_tokens)
        ids = self._ids[:-1].view(shape)
        lengths = (ids != _UNWRITTEN).sum(-1).tolist()
        written = [tuple(row[:n]) for row, n in zip(ids.tolist(), lengths, strict=True)]
        logprobs = self._logprobs[:-1].view(shape).tolist()
        return Rollout(
            response_ids=tuple(written),
            logprobs=tuple(tuple(row[:n]) for row, n in zip(logprobs, lengths, strict=True)),
            stop_reasons=tuple(
                "eos" if row and row[-1] in self._eos_ids else "length" for row in written
            ),
            num_row_steps=num_row_steps,
        )
