"""Generation without a cache: a pass over the whole row for every token, padded on the right.

For models without a cache, or whose cache is useless beyond a length because each length has its
own rotary frequencies. The cost grows with the square of the length.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from okd_lightning.engines.drawing import Drawing
from okd_lightning.engines.memory import whole_logits
from okd_lightning.models import forget_lengths, row_groups

_PASS_TOKENS = 8192
"""Most tokens of one forward pass, so that its activations fit in memory."""


class WholePasses:
    """Generation of rows by whole passes.

    Args:
        models: One model, or two that are mixed.
        texts: Ids of each row so far, by its number in the call.
        drawing: Samples and stores tokens.
        token_budget: Most tokens of a batch.
        max_new_tokens: Longest response, in tokens.
    """

    def __init__(
        self,
        models: Sequence[PreTrainedModel],
        texts: Mapping[int, tuple[int, ...]],
        drawing: Drawing,
        token_budget: int,
        max_new_tokens: int,
    ) -> None:
        self._models = models
        self._texts = dict(texts)
        self._drawing = drawing
        self._token_budget = token_budget
        self._max_new_tokens = max_new_tokens
        self.num_row_steps = 0

    def run(self) -> Iterator[tuple[int, int]]:
        """Generate all rows; yield the rows ended since the last yield, and new tokens."""
        queue = sorted(self._texts, key=lambda row: (-len(self._texts[row]), row))
        while queue:
            longest = len(self._texts[queue[0]]) + self._max_new_tokens
            size = max(1, self._token_budget // longest)
            yield from self._generate(queue[:size])
            queue = queue[size:]

    def _generate(self, rows: list[int]) -> Iterator[tuple[int, int]]:
        responses = self._drawing.responses
        places, last = responses.next_places(rows), responses.last_places(rows)
        while rows:
            texts = [self._texts[row] for row in rows]
            tables = [_next_logits(model, texts) for model in self._models]
            places, ids = self._drawing.draw(tables, places, last)
            self.num_row_steps += len(rows)
            for row, token in zip(rows, ids.tolist(), strict=True):
                self._texts[row] += (token,)
            goes_on = places < responses.waste
            places, last = places[goes_on], last[goes_on]
            num_before = len(rows)
            rows = [row for row, stays in zip(rows, goes_on.tolist(), strict=True) if stays]
            yield num_before - len(rows), num_before


def _next_logits(model: PreTrainedModel, texts: Sequence[tuple[int, ...]]) -> Tensor:
    """Return [rows, table] logits for the token after each text, from as many passes as needed."""
    groups = row_groups(model)
    lengths = [len(text) for text in texts]
    order, found = [], []
    for number, rows in enumerate(groups.split(lengths)):
        if number == 0 and groups.follows_a_short_row(max(lengths[row] for row in rows)):
            forget_lengths(model)
        size = max(1, _PASS_TOKENS // max(lengths[row] for row in rows))
        for first in range(0, len(rows), size):
            part = rows[first : first + size]
            found.append(whole_logits(model, [texts[row] for row in part]))
            order += part
    return torch.cat(found)[torch.tensor(order, device=found[0].device).argsort()]
