"""The built-in engine: any transformers causal LM, generating in this process.

All prompts of a call are one queue, longest first. A batch holds as many rows as the token budget
allows; rows that have ended leave it and waiting prompts take their place (continuous batching).
All rows share their columns: joining rows are aligned on the right, and each row attends from its
own first column on.

Only the model and its cache are transformers'. Its ``generate`` keeps finished rows in the batch,
and its noise depends on the batch. Its continuous batching stores rows in pages, for which it
changes the model's attention while it runs; it samples from the global generator, and takes twice
our time on a CPU (benchmarks/rollouts.md).

Further models may be mixed in: all read the same ids, and every token is sampled from a mixture of
their distributions.

In float32 a row's samples do not depend on the other rows of its batch, except for ties.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from okd_lightning.engines.drawing import Drawing, DrawnFrom, Responses
from okd_lightning.engines.kv_cache import CachedModel, empty_cache, rearrange
from okd_lightning.engines.memory import MEMORIES, memory_of
from okd_lightning.engines.prompt_images import PromptImages, placed
from okd_lightning.engines.whole_passes import WholePasses
from okd_lightning.errors import ConfigError
from okd_lightning.losses.cpu_linear import fast_linears
from okd_lightning.models import Vocabulary, forget_lengths, row_groups
from okd_lightning.models.multimodal import image_arguments
from okd_lightning.models.processors import ImageReader
from okd_lightning.records.images import ImageInputs
from okd_lightning.records.noise import NoiseStream
from okd_lightning.records.requests import Prompt, Request, Rollout
from okd_lightning.records.sampling import Sampling

_ADMIT_AT = 0.875
"""Waiting prompts join once no more than this share of the batch is unfinished."""

_SHRINK_AT = 0.75
"""Without waiting prompts, finished rows leave at this share: moving the others costs a copy."""

_PREFILL_TOKENS = 8192
"""Most prompt tokens of one forward pass, so that a long queue's activations fit in memory."""

_CLOSE_LENGTH, _ENOUGH_TOKENS = 0.875, 1024
"""A forward pass of enough prompt tokens takes no prompt shorter than this share of its longest."""


@dataclass
class TransformersEngine:
    """Generates with a model in this process.

    Args:
        model: The causal LM; the caller sets eval mode.
        vocabulary: Ids outside it are never sampled; the log-probability of one of its end ids is
            that of all of them together.
        eos_ids: Ids that end a response.
        token_budget: Most prompt and response tokens of a batch.
        dtype: Number format to compute in, by autocast: the weights are cast once per call and the
            copy is dropped at its end. None leaves it to the caller. In float32 a sample does not
            depend on its batch, in bfloat16 it may.
        blend: Further models that are mixed into every draw.
        images: Processor of all models; None for models that read text alone.
    """

    model: PreTrainedModel
    vocabulary: Vocabulary
    eos_ids: tuple[int, ...]
    token_budget: int = 65536
    dtype: torch.dtype | None = None
    blend: DrawnFrom | None = None
    images: ImageReader | None = None

    @torch.no_grad()
    def respond(self, request: Request) -> Rollout:
        """Generate one response per prompt, in the order of the prompts; see ``RolloutEngine``."""
        prompts, progress = request.prompts, request.progress
        keys = [prompt.index for prompt in prompts], [prompt.sample for prompt in prompts]
        noise = request.noise.uniform(*keys, request.max_new_tokens)
        responses = Responses(
            noise,
            self.eos_ids,
            self.vocabulary.size,
            self.model.device,
            request.limits,
            merges_ends=len(self.vocabulary.end_ids) > 1,
        )
        if not noise.numel():
            return responses.rollout(0)
        as_it_is = torch.compiler.set_stance("force_eager")  # a step changes its shapes each time
        others = () if self.blend is None else self.blend.models
        drawing = Drawing(
            responses, request.sampling, self.vocabulary, self.blend, self.model.device
        )
        num_reported = num_row_steps = 0
        with self._precision(), ExitStack() as fast, as_it_is:
            for model in (self.model, *others):
                fast.enter_context(fast_linears(model))
            for generation, is_only in self._rounds(request, drawing):
                for num_ended, num_tokens in generation.run():
                    if progress is not None:
                        progress(num_ended if is_only else 0, num_tokens)
                num_row_steps += generation.num_row_steps
                if progress is not None and not is_only:
                    num_reported, num_before = responses.num_ended(), num_reported
                    progress(num_reported - num_before)
        return responses.rollout(num_row_steps)

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        noise: NoiseStream,
        max_new_tokens: int,
    ) -> Rollout:
        """Generate one response per prompt, for scripts; see ``respond``."""
        return self.respond(Request(tuple(prompts), sampling, noise, max_new_tokens))

    def _rounds(
        self, request: Request, drawing: Drawing
    ) -> Iterator[tuple[_Round | WholePasses, bool]]:
        """Yield one round (True), or (False) one per range of lengths with the same frequencies.

        A row that grows beyond a length at which rotary frequencies change is read again from its
        start, because its cache has the old frequencies.
        """
        prompts = [prompt.ids for prompt in request.prompts]
        models = [self.model, *(self.blend.models if self.blend else ())]
        memories = [memory_of(model) for model in models]
        groups = [row_groups(model) for model in models]
        switches = sorted({g.switch for g in groups if g.switch is not None})
        for shortest, longest in zip((0, *switches), (*switches, None), strict=True):
            texts = drawing.responses.begin_round(prompts, longest)
            by_length = any(g.by_length and shortest >= (g.switch or 0) for g in groups)
            memory = "none" if by_length else max(memories, key=MEMORIES.index)
            call = (models, texts, drawing, self.token_budget, request.max_new_tokens)
            if memory == "none":
                self._refuse_images(request)
                yield WholePasses(*call), not switches
                continue
            for model, own in zip(models, groups, strict=True):
                if own.by_length:
                    forget_lengths(model)
            has_images = any(prompt.images for prompt in request.prompts)
            images = PromptImages.of(self.images, request.prompts) if has_images else None
            yield _Round(*call, is_roomy=memory == "rows", images=images), not switches

    def _refuse_images(self, request: Request) -> None:
        if any(prompt.images for prompt in request.prompts):
            raise ConfigError(
                f"{type(self.model).__name__} continues from no cache, and a pass over the whole "
                "row for each token reads no images: use a method that learns from dataset "
                "responses, with --data.val_rollouts 0"
            )

    def _precision(self) -> AbstractContextManager[object]:
        if self.dtype is None:
            return nullcontext()
        return torch.autocast(self.model.device.type, self.dtype)


@dataclass
class _Prefilled:
    """Prompts after their forward pass, ready to join a batch."""

    rows: list[int]
    caches: list[DynamicCache]  # one per model
    index: Tensor  # [rows] row of the caches
    starts: Tensor  # [rows] first column
    width: int  # columns
    deltas: Tensor  # [models, rows] difference of a token's position and its number in the row
    places: Tensor  # [rows] of the second token
    last: Tensor  # [rows] place of the last token
    tokens: Tensor  # [rows] the first token


class _Round:
    """One round of a call: its queue, the running batch, and its row-steps.

    The batch's fields are aligned: ``rows`` (numbers in the call), ``places`` and ``last`` in the
    responses, ``tokens`` (sampled, not yet read), ``starts`` (first column), all [rows]; ``deltas``
    (of positions, where images take fewer than they have tokens), [models, rows].
    """

    def __init__(
        self,
        models: Sequence[PreTrainedModel],
        texts: Mapping[int, tuple[int, ...]],
        drawing: Drawing,
        token_budget: int,
        max_new_tokens: int,
        *,
        is_roomy: bool,
        images: PromptImages | None = None,
    ) -> None:
        self._images = images
        self._models = models
        self._cached = [CachedModel(model) for model in models]
        self._texts = texts
        self._drawing = drawing
        self._responses = drawing.responses
        self._max_new_tokens = max_new_tokens
        self._token_budget = token_budget
        self._device = models[0].device
        self._is_roomy = is_roomy
        # equal prompts are neighbours, so that they are read once
        self._queue = deque(sorted(texts, key=lambda row: (-len(texts[row]), row)))
        self.num_row_steps = 0
        self._clear()

    def _clear(self) -> None:
        self._rows: list[int] = []
        self._caches = self._empty_caches()
        self._width = 0
        self._num_unfinished = 0
        self._places = self._last = self._tokens = self._starts = torch.zeros(
            0, dtype=torch.int64, device=self._device
        )
        self._deltas = self._starts.new_zeros(len(self._models), 0)

    def _empty_caches(self) -> list[DynamicCache]:
        return [empty_cache(model, self._is_roomy) for model in self._models]

    def run(self) -> Iterator[tuple[int, int]]:
        """Generate all rows; yield the rows ended since the last yield, and new tokens.

        On an accelerator, rows that end between two checks count tokens up to the second one.
        """
        steps_per_check = _steps_per_check(self._device)
        while self._queue or self._num_unfinished:
            num_before = self._num_unfinished
            num_joined = self._make_room()
            if not num_joined:
                for _ in range(steps_per_check):
                    self._step()
            self._num_unfinished = int((self._places < self._responses.waste).sum())
            num_ended = num_before + num_joined - self._num_unfinished
            yield num_ended, num_joined or num_before * steps_per_check

    # ---------------------------------------------------------------- rows of the batch

    def _make_room(self) -> int:
        """Let ended rows leave and waiting rows join if it pays; return the number that joined."""
        if not self._is_roomy:
            return self._next_equal_prompts() if not self._num_unfinished else 0
        share = _ADMIT_AT if self._queue else _SHRINK_AT
        if self._num_unfinished > share * len(self._rows):
            return 0
        keep = (self._places < self._responses.waste).nonzero().squeeze(-1)
        kept = keep.tolist()
        rows = self._admitted([self._rows[i] for i in kept])
        joining = [self._read(piece) for piece in self._pieces(rows)]
        self._rearrange(keep, kept, joining)
        return len(rows)

    def _admitted(self, staying: list[int]) -> list[int]:
        """Take rows from the queue: as many as fit with the rows that stay, at least one in all."""
        if not self._queue:
            return []
        longest = max(len(self._texts[row]) for row in [*staying, self._queue[0]])
        size = max(1, self._token_budget // (longest + self._max_new_tokens))
        num = min(len(self._queue), max(0, size - len(staying)))
        return [self._queue.popleft() for _ in range(num)]

    def _pieces(self, rows: list[int]) -> Iterator[list[int]]:
        """Divide rows, sorted with the longest first, into forward passes with little padding."""
        while rows:
            longest = len(self._texts[rows[0]])
            size, enough = max(1, _PREFILL_TOKENS // longest), -(-_ENOUGH_TOKENS // longest)
            close = sum(len(self._texts[row]) >= _CLOSE_LENGTH * longest for row in rows[:size])
            size = min(size, max(close, enough))
            yield rows[:size]
            rows = rows[size:]

    def _rearrange(self, keep: Tensor, kept: list[int], joining: list[_Prefilled]) -> None:
        if not kept and not joining:
            self._clear()
            return
        starts = self._starts[keep]
        lead = int(starts.min()) if kept else self._width
        width = max([self._width - lead, *(piece.width for piece in joining)])
        for i, cache in enumerate(self._caches):
            rearrange(cache, keep, lead, [(piece.caches[i], piece.index) for piece in joining])
        self._starts = torch.cat(
            [
                starts + (width - self._width),
                *(piece.starts + (width - piece.width) for piece in joining),
            ]
        )
        self._deltas = torch.cat([self._deltas[:, keep], *(p.deltas for p in joining)], 1)
        self._rows = [self._rows[i] for i in kept]
        self._rows += [row for piece in joining for row in piece.rows]
        self._places = torch.cat([self._places[keep], *(piece.places for piece in joining)])
        self._tokens = torch.cat([self._tokens[keep], *(piece.tokens for piece in joining)])
        self._last = torch.cat([self._last[keep], *(piece.last for piece in joining)])
        self._width = width

    def _next_equal_prompts(self) -> int:
        """Start a fixed batch for a model whose cache cannot be rearranged; return its rows."""
        self._clear()
        length = len(self._texts[self._queue[0]])
        size = max(1, self._token_budget // (length + self._max_new_tokens))
        rows = [row for row in self._queue if len(self._texts[row]) == length][:size]
        self._queue = deque(row for row in self._queue if row not in set(rows))
        read = self._read(rows)
        self._caches, self._rows, self._starts = read.caches, read.rows, read.starts
        self._places, self._tokens, self._width = read.places, read.tokens, read.width
        self._deltas, self._last = read.deltas, read.last
        return len(rows)

    # ---------------------------------------------------------------- the model

    def _read(self, rows: list[int]) -> _Prefilled:
        """Read some prompts and sample their first tokens; equal prompts are read once."""
        refs = {} if self._images is None else self._images.refs
        prompts = [(self._texts[row], refs.get(row)) for row in rows]
        first = dict(zip(reversed(prompts), reversed(rows), strict=True))
        number = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
        unique = [first[prompt] for prompt in number] if self._is_roomy else rows
        indices = [number[prompt] for prompt in prompts] if self._is_roomy else range(len(rows))
        index = torch.tensor(list(indices), device=self._device)
        ids, starts = _left_pad([self._texts[row] for row in unique], self._device)
        caches = self._empty_caches()
        columns = torch.arange(ids.shape[1], device=self._device)
        positions = [(columns - starts[:, None]).clamp(min=0)] * len(self._models)
        deltas, images = ids.new_zeros(len(self._models), len(ids)), None
        if self._images is not None:
            images = self._images.inputs(unique, self._device)
            positions, deltas = placed(self._models, ids, starts, images, positions, deltas)
        tables = self._logits(ids, positions, starts, ids.shape[1], caches, images)
        self.num_row_steps += len(rows)
        places, last = self._responses.next_places(rows), self._responses.last_places(rows)
        places, tokens = self._drawing.draw(tables, places, last, index)
        own = starts[index], ids.shape[1], deltas[:, index]
        return _Prefilled(rows, caches, index, *own, places, last, tokens)

    def _step(self) -> None:
        """Generate one token for every row."""
        is_unfinished = self._places < self._responses.waste
        numbers = self._width - self._starts
        positions = [
            torch.where(is_unfinished, numbers if self._images is None else numbers + more, 0)
            for more in self._deltas
        ]
        self._width += 1
        tables = self._logits(
            self._tokens[:, None],
            [p[:, None] for p in positions],
            self._starts,
            self._width,
            self._caches,
        )
        self.num_row_steps += len(self._rows)
        self._places, self._tokens = self._drawing.draw(tables, self._places, self._last)

    def _logits(
        self,
        ids: Tensor,
        positions: Sequence[Tensor],
        starts: Tensor,
        width: int,
        caches: list[DynamicCache],
        images: ImageInputs | None = None,
    ) -> list[Tensor]:
        """Return [rows, table] logits of each model for the token after ``ids``."""
        mask = None
        if self._is_roomy:  # else all prompts have one length, and some models misread a mask
            mask = (torch.arange(width, device=self._device) >= starts[:, None]).long()
        own_images = [
            None if images is None else image_arguments(model, ids, images)
            for model in self._models
        ]
        sides = zip(self._cached, positions, caches, own_images, strict=True)
        return [model.logits(ids, own, mask, cache, shown) for model, own, cache, shown in sides]


def _steps_per_check(device: torch.device) -> int:
    """Return the steps between checks for ended rows: a check stalls an accelerator's queue."""
    return 1 if device.type == "cpu" else 4


def _left_pad(rows: Sequence[tuple[int, ...]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return [rows, longest] ids, and [rows] the first column of each row."""
    width = max(len(row) for row in rows)
    padded = [(0,) * (width - len(row)) + row for row in rows]
    starts = torch.tensor([width - len(row) for row in rows], device=device)
    return torch.tensor(padded, device=device), starts
