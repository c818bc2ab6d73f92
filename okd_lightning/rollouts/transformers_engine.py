"""The built-in engine: any transformers causal LM, with its own key-value cache.

Prompts are sorted by length and run in left-padded batches under a token budget; rows that have
drawn an end-of-sequence id leave the batch and its cache. Logits are computed for the last position
only. ``generate`` of transformers is not used because finished rows stay in its batch and its noise
depends on the batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from okd_lightning.models import Vocabulary
from okd_lightning.records import PromptBatch, Rollout
from okd_lightning.rollouts.engine import Progress
from okd_lightning.rollouts.noise import NoiseStream
from okd_lightning.rollouts.sampling import Sampling, draw

_SHRINK_AT = 0.75
"""Finished rows leave once no more than this share of the batch is still writing."""


@dataclass
class _Batch:
    """The rows that are still writing; every field is cut together when rows leave."""

    rows: Tensor  # [alive] position of each row in the whole call
    noise: Tensor  # [alive, max_new_tokens]
    limits: Tensor  # [alive] longest response of each row
    attention_mask: Tensor  # [alive, seq so far]
    is_writing: Tensor  # [alive] False once a row has ended but still stands in the batch
    cache: DynamicCache

    def keep(self, index: Tensor) -> None:
        self.rows, self.noise = self.rows[index], self.noise[index]
        self.limits = self.limits[index]
        self.attention_mask = self.attention_mask[index]
        self.is_writing = self.is_writing[index]
        self.cache.batch_select_indices(index)


@dataclass
class TransformersEngine:
    """Generates with a model that lives in this process.

    Args:
        model: The causal LM; put into eval mode by the caller.
        vocabulary: Ids outside it are never drawn.
        eos_ids: Ids that end a response.
        token_budget: Prompt plus response tokens of a batch at most.
    """

    model: PreTrainedModel
    vocabulary: Vocabulary
    eos_ids: tuple[int, ...]
    token_budget: int = 65536
    _written: list[tuple[list[int], list[float]]] = field(default_factory=list, repr=False)

    @torch.no_grad()
    def generate(
        self,
        prompts: PromptBatch,
        sampling: Sampling,
        generator: NoiseStream,
        max_new_tokens: int,
        progress: Progress | None = None,
    ) -> Rollout:
        """One response a prompt, in the order of the prompts; see ``RolloutEngine``."""
        self._written = [([], []) for _ in range(len(prompts))]
        noise = generator.uniform(prompts.index, prompts.sample, max_new_tokens)
        for rows in self._batches(prompts, max_new_tokens):
            self._write(rows, prompts, sampling, noise[rows], progress)
        responses = self._written
        self._written = []
        return Rollout(
            response_ids=tuple(tuple(ids) for ids, _ in responses),
            logprobs=tuple(tuple(logprobs) for _, logprobs in responses),
            stop_reasons=tuple(
                "eos" if ids and ids[-1] in self.eos_ids else "length" for ids, _ in responses
            ),
        )

    def _batches(self, prompts: PromptBatch, max_new_tokens: int) -> Iterator[list[int]]:
        """Row numbers, longest prompts first, so many that the longest fits the budget."""
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts.input_ids[i]))
        while order:
            width = len(prompts.input_ids[order[0]]) + max_new_tokens
            size = max(1, self.token_budget // width)
            yield order[:size]
            order = order[size:]

    def _write(
        self,
        rows: list[int],
        prompts: PromptBatch,
        sampling: Sampling,
        noise: Tensor,
        progress: Progress | None,
    ) -> None:
        device = self.model.device
        ids, attention_mask = _left_pad([prompts.input_ids[row] for row in rows], device)
        batch = _Batch(
            rows=torch.tensor(rows, device=device),
            noise=noise.to(device),
            limits=torch.tensor(_limits(rows, prompts, noise.shape[1]), device=device),
            attention_mask=attention_mask,
            is_writing=torch.ones(len(rows), dtype=torch.bool, device=device),
            cache=DynamicCache(config=self.model.config),
        )
        for position in range(noise.shape[1]):
            logits = self._next_logits(ids, batch)
            drawn, logprobs = draw(sampling.logprobs(logits), batch.noise[:, position])
            self._record(batch, drawn, logprobs)
            num_before = int(batch.is_writing.sum())
            batch.is_writing &= ~self._ends(drawn) & (batch.limits > position + 1)
            num_writing = int(batch.is_writing.sum())
            if progress is not None and num_writing < num_before:
                progress(num_before - num_writing)
            if num_writing == 0:
                return
            if num_writing <= _SHRINK_AT * len(batch.rows):
                alive = batch.is_writing.nonzero().squeeze(-1)
                batch.keep(alive)
                drawn = drawn[alive]
            ids = drawn[:, None]
            ones = batch.attention_mask.new_ones(len(ids), 1)
            batch.attention_mask = torch.cat([batch.attention_mask, ones], dim=1)

    def _next_logits(self, ids: Tensor, batch: _Batch) -> Tensor:
        """[alive, vocab] for the token after ``ids``; invalid ids are minus infinity."""
        position_ids = batch.attention_mask.cumsum(-1).sub(1).clamp(min=0)[:, -ids.shape[1] :]
        output = self.model(
            input_ids=ids,
            attention_mask=batch.attention_mask,
            position_ids=position_ids,
            past_key_values=batch.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return self.vocabulary.cut(output.logits[:, -1].float())

    def _record(self, batch: _Batch, drawn: Tensor, logprobs: Tensor) -> None:
        rows = zip(
            batch.rows.tolist(),
            batch.is_writing.tolist(),
            drawn.tolist(),
            logprobs.tolist(),
            strict=True,
        )
        for row, is_writing, token, logprob in rows:
            if is_writing:
                self._written[row][0].append(token)
                self._written[row][1].append(logprob)

    def _ends(self, drawn: Tensor) -> Tensor:
        return torch.isin(drawn, torch.tensor(self.eos_ids, device=drawn.device))


def _limits(rows: list[int], prompts: PromptBatch, max_new_tokens: int) -> list[int]:
    if not prompts.limits:
        return [max_new_tokens] * len(rows)
    return [min(prompts.limits[row], max_new_tokens) for row in rows]


def _left_pad(rows: list[tuple[int, ...]], device: torch.device) -> tuple[Tensor, Tensor]:
    width = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    mask = torch.zeros(len(rows), width, dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = torch.tensor(row)
        mask[i, width - len(row) :] = 1
    return ids.to(device), mask.to(device)
