"""The RolloutLoader: a sized, re-iterable, stateful source of training batches.

Owns the order of prompts, the rollout batches (``chunk`` in the code) in which responses are
generated, and the cursor. Lightning saves its state with every checkpoint and restores it before
the first batch. The state includes the rollouts of the current rollout batch, so that a resumed run
trains on the same responses. A rollout batch is a whole number of optimizer steps; every rank gets
the same number of batches.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from okd_lightning.engines.engine import Author, ProgressFactory, Writer, silent_progress
from okd_lightning.errors import ConfigError
from okd_lightning.records.batches import DistillBatch, Example, PromptBatch, Rollout, TrainingRow
from okd_lightning.records.noise import NoiseDomain, NoiseStream, hashed_uniform
from okd_lightning.records.rows import (
    count_by_source,
    given_row,
    micro_batches,
    muted,
    rollout_metrics,
    share,
    written_rows,
)
from okd_lightning.records.sampling import Sampling
from okd_lightning.rollouts.agreement import Agreement, StopRequest, naming_the_prompts
from okd_lightning.rollouts.lengths import RolloutLengths
from okd_lightning.rollouts.loader_shape import LoaderShape
from okd_lightning.rollouts.plan import RolloutPlan, StagedPlan
from okd_lightning.rollouts.resharing import RowKey, reshared, reshared_credits
from okd_lightning.rollouts.scoring import ChunkScorer, unscored
from okd_lightning.rollouts.stored import (
    pack_credits,
    pack_rollout,
    unpack_credits,
    unpack_rollout,
)

_AUTHORS: tuple[Author, ...] = ("student", "teacher")
_NOTHING = Rollout((), (), ())


@dataclass(frozen=True)
class _Turn:
    """One row of an epoch: its example, and its sample number in that epoch."""

    example: Example
    sample: int


class RolloutLoader:
    """Yields an epoch's training batches; see the module's docstring.

    Args:
        examples: The tokenized dataset.
        plan: The sources of rows.
        shape: Division of an epoch.
        writer: Generates the student's and the teacher's responses.
        sampling: Temperature, top-k and top-p.
        max_new_tokens: Longest response, in tokens.
        seed: Keys the order, the choice of sources and the sampling noise.
        reduce_sum: Sums an int64 tensor over all ranks.
        gather: Collects one object of every rank, on every rank.
        progress: Shows the progress of a rollout batch.
        score: Gives the student's responses their advantages.
        stop: This rank's request to stop, which discards an unfinished rollout batch.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        plan: RolloutPlan | StagedPlan,
        shape: LoaderShape,
        writer: Writer,
        *,
        sampling: Sampling,
        max_new_tokens: int,
        seed: int,
        reduce_sum: Callable[[Tensor], Tensor] = lambda counts: counts,
        gather: Callable[[Any], list[Any]] = lambda state: [state],
        progress: ProgressFactory = silent_progress,
        score: ChunkScorer = unscored,
        stop: StopRequest | None = None,
    ) -> None:
        self.examples = examples
        self.plan = plan
        self.shape = shape
        self._writer = writer
        self._sampling = sampling
        self._max_new_tokens = max_new_tokens
        self._seed = seed
        self._reduce_sum = reduce_sum
        self._gather = gather
        self._progress = progress
        self._score = score
        self._agreement = Agreement(gather, stop or StopRequest())
        self._epoch = 0
        self._delivered = 0  # micro-batches of this epoch
        self._written: dict[Author, Rollout] = {}
        self._credits: dict[str, list[float]] | None = None  # of the student's responses
        self._written_for = 0  # first optimizer step of the current rollout batch
        self._is_written = False  # on all ranks
        self.lengths = RolloutLengths()
        self._unreported: list[tuple[Rollout, float]] = []  # with the seconds that each took
        self._unreported_scores: dict[str, float] = {}

    def __len__(self) -> int:
        return self.shape.steps_per_epoch * self.shape.accumulate_grad_batches

    def __iter__(self) -> Iterator[DistillBatch]:
        if self._delivered >= len(self):
            self.start_at(self._epoch + 1)
        turns = self._turns(self._epoch)
        accumulate = self.shape.accumulate_grad_batches
        for chunk_start in range(0, self.shape.steps_per_epoch, self.shape.steps_per_chunk):
            chunk_end = min(chunk_start + self.shape.steps_per_chunk, self.shape.steps_per_epoch)
            if self._delivered >= chunk_end * accumulate:
                continue
            if self._written_for != chunk_start:
                self._forget_written(chunk_start)
            for step, rows in enumerate(self._chunk(turns, chunk_start, chunk_end), chunk_start):
                yield from self._step(step, rows)

    @property
    def epoch_to_come(self) -> int:
        """The epoch of the next batch."""
        return self._epoch + (self._delivered >= len(self))

    def position(self) -> dict[str, Any]:
        """Return the next epoch, the fingerprint of its rows and their divisor, for ``begin``."""
        rows, lengths = self.fingerprint(), self.lengths.state_dict()
        return {"epoch": self.epoch_to_come, "rows": rows, "lengths": lengths}

    def begin(self, position: dict[str, Any]) -> None:
        """Begin with an epoch, after a check that its rows are those of the checkpoint."""
        if (saved := position.pop("rows", None)) is not None:
            self.check_same(saved)
        if "lengths" in position:  # a checkpoint of an earlier version has none
            self.lengths.load_state_dict(position["lengths"])
        self.start_at(position["epoch"])

    def start_at(self, epoch: int) -> None:
        """Begin with the first batch of an epoch."""
        self._epoch, self._delivered = epoch, 0
        self._forget_written(0)

    def _forget_written(self, chunk_start: int) -> None:
        self._written, self._credits = {}, None
        self._written_for, self._is_written = chunk_start, False

    def state_dict(self) -> dict[str, Any]:
        """Return epoch, cursor and the current rollout batch of all ranks."""
        own = {author: pack_rollout(rollout) for author, rollout in self._written.items()}
        return {
            "epoch": self._epoch,
            "delivered": self._delivered,
            "accumulate": self.shape.accumulate_grad_batches,
            **self.fingerprint(),
            "sources": self._sources_of(self._written_for),
            "written_for": self._written_for,
            "written": self._gather(own),
            "credits": self._gather(pack_credits(self._credits)),
            "lengths": self.lengths.state_dict(),
        }

    def fingerprint(self) -> dict[str, Any]:
        """Return what determines the rows of an optimizer step, for ``check_same``."""
        return {"rows_per_step": self.shape.rows_per_step, "identity": self._identity}

    def check_same(self, state: Mapping[str, Any]) -> None:
        """Refuse a checkpoint of other steps or prompts.

        Args:
            state: ``fingerprint`` or ``state_dict`` of the checkpoint.

        Raises:
            ConfigError: The number of rows of an optimizer step, prompts, seed or rollout batches
                differ.
        """
        if state["rows_per_step"] != self.shape.rows_per_step:
            raise ConfigError(
                f"this run has {self.shape.rows_per_step} rows an optimizer step (batch_size x "
                f"accumulation x ranks), the checkpoint was written with {state['rows_per_step']}; "
                f"set --data.global_batch_size {state['rows_per_step']}"
            )
        if state["identity"] != self._identity:
            raise ConfigError(
                "this run's prompts, teacher prompts, seed, prompts_per_epoch, prompts_per_rollout "
                "or samples_per_prompt differ from the checkpoint's; resume with the same, or "
                "start a new run from the exported student: --model.student FOLDER"
            )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict``.

        Raises:
            ConfigError: See ``check_same``.
        """
        self.check_same(state)
        if "lengths" in state:
            self.lengths.load_state_dict(state["lengths"])
        self._epoch, self._delivered = state["epoch"], state["delivered"]
        if state["accumulate"] != self.shape.accumulate_grad_batches:  # whole steps are done
            num_steps = state["delivered"] // state["accumulate"]
            self._delivered = num_steps * self.shape.accumulate_grad_batches
        self._forget_written(state["written_for"])
        if state.get("sources", own := self._sources_of(self._written_for)) != own:
            return  # another on-policy share: the responses are generated again
        self._is_written = any(state["written"])
        self._take(
            [{by: unpack_rollout(part) for by, part in own.items()} for own in state["written"]],
            [unpack_credits(credits) for credits in state["credits"]],
        )

    def _sources_of(self, first: int) -> list[str]:
        """Return the source of each row of the rollout batch that begins at step ``first``."""
        turns = self._turns(self._epoch)
        last = min(first + self.shape.steps_per_chunk, self.shape.steps_per_epoch)
        steps = range(first, last)
        return [str(source) for step in steps for _, source in self._rows_of_step(turns, step)]

    def _take(
        self,
        written: list[dict[Author, Rollout]],
        credits: list[dict[str, list[float]] | None],
    ) -> None:
        """Take this rank's part of a checkpoint's rollout batch of all ranks."""
        rank, world_size = self.shape.rank, self.shape.world_size
        if len(written) == world_size:
            self._written, self._credits = written[rank], credits[rank]
            return
        turns = self._turns(self._epoch)
        owners = [self._keys(turns, old, len(written)) for old in range(len(written))]
        own = self._keys(turns, rank, world_size)
        self._written = reshared(written, owners, own)
        self._credits = reshared_credits(
            credits, [keys["student"] for keys in owners], own["student"]
        )

    def _keys(self, turns: list[_Turn], rank: int, world_size: int) -> dict[Author, list[RowKey]]:
        """Return the rows of the stored rollout batch that a rank generates, in order."""
        keys: dict[Author, list[RowKey]] = {author: [] for author in _AUTHORS}
        first = self._written_for
        last = min(first + self.shape.steps_per_chunk, self.shape.steps_per_epoch)
        for step in range(first, last):
            rows = list(enumerate(self._rows_of_step(turns, step)))
            for place, (_, author) in share(rows, rank, world_size):
                if author != "dataset":
                    keys[author].append((step, place))
        return keys

    @cached_property
    def _identity(self) -> list[int]:
        """Numbers that determine the order of prompts: equal lists mean equal batches."""
        shape = self.shape
        read = [(example.prompt_ids, example.teacher_prompt_ids) for example in self.examples]
        prompts = zlib.crc32(repr(read).encode())
        cut = [shape.prompts_per_epoch, shape.steps_per_chunk, shape.samples_per_prompt]
        return [self._seed, len(self.examples), prompts, *cut]

    def _turns(self, epoch: int) -> list[_Turn]:
        """Return the epoch's prompts: the next ones of an endless sequence of shuffled passes."""
        num, length = self.shape.prompts_per_epoch, len(self.examples)
        samples = self.shape.samples_per_prompt
        positions = range(epoch * num, (epoch + 1) * num)
        orders: dict[int, np.ndarray] = {}
        seen: dict[int, int] = {}
        turns = []
        for position in positions:
            number, offset = divmod(position, length)
            if number not in orders:
                keys = hashed_uniform(
                    NoiseDomain.PROMPT_ORDER, self._seed, number, np.arange(length)
                )
                orders[number] = keys.argsort(kind="stable")
            index = int(orders[number][offset])
            turns.append(_Turn(self.examples[index], seen.get(index, 0) * samples))
            seen[index] = seen.get(index, 0) + 1
        return turns

    def _chunk(self, turns: list[_Turn], start: int, end: int) -> list[list[TrainingRow]]:
        """Return this rank's rows of the optimizer steps start..end, with generated responses."""
        of_all = [self._rows_of_step(turns, step) for step in range(start, end)]
        rank, world_size = self.shape.rank, self.shape.world_size
        steps = [list(share(rows, rank, world_size)) for rows in of_all]
        own: dict[Author, list[_Turn]] = {
            author: [turn for step in steps for turn, by in step if by == author]
            for author in _AUTHORS
        }
        asked = {by for rows in of_all for _, by in rows if by != "dataset"}
        if asked and not self._is_written:
            self._written = self._agreement.together(lambda: self._write_all(own, asked))
            self._is_written = True
        numbers = [
            step for step, rows in enumerate(steps, start) for _, by in rows if by == "student"
        ]
        self._ask_credits(own["student"], numbers)
        written = {author: iter(self._rows_of(author, own[author])) for author in _AUTHORS}
        chunk = []
        for step in steps:
            rows = [
                given_row(turn.example) if by == "dataset" else next(written[by])
                for turn, by in step
            ]
            chunk.append(rows or [muted(given_row(self.examples[0]))])
        if "student" in asked:
            counts = self._reduce_sum(count_by_source([row for rows in chunk for row in rows]))
            self.lengths.begin(self._epoch, start, counts)
        return chunk

    def _write_all(
        self, own: dict[Author, list[_Turn]], asked: set[Author]
    ) -> dict[Author, Rollout]:
        """Generate by each model that any rank needs, also without prompts on this rank.

        (All ranks gather a sharded model together.)
        """
        return {by: self._write(by, turns) for by, turns in own.items() if by in asked}

    def _ask_credits(self, turns: list[_Turn], steps: list[int]) -> None:
        """Score once a rollout batch on every rank, also without student responses on it."""
        if self._credits is not None:
            return
        first = self._epoch * self.shape.steps_per_epoch
        rollout = self._written.get("student", _NOTHING)
        scores = self._score(
            [turn.example for turn in turns],
            [turn.sample for turn in turns],
            rollout,
            [first + step for step in steps],
        )
        self._credits, self._unreported_scores = scores.credits, scores.metrics

    def _rows_of(self, author: Author, turns: list[_Turn]) -> list[TrainingRow]:
        """Return the rows of a generator's responses in the current rollout batch."""
        credits = (self._credits or {}) if author == "student" else {}
        rollout = self._written.get(author, _NOTHING)
        return written_rows([turn.example for turn in turns], author, rollout, credits)

    def _rows_of_step(self, turns: list[_Turn], step: int) -> list[tuple[_Turn, Any]]:
        """Return all ranks' rows of a step: every sample of a prompt, or its dataset response."""
        per_step = self.shape.prompts_per_step
        of_step = turns[step * per_step : (step + 1) * per_step]
        number = self._epoch * self.shape.steps_per_epoch + step
        sources = self.plan.assign(self._seed, number, len(of_step))
        return [
            (_Turn(turn.example, turn.sample + k), source)
            for turn, source in zip(of_step, sources, strict=True)
            for k in range(1 if source == "dataset" else self.shape.samples_per_prompt)
        ]

    def _write(self, author: Author, turns: list[_Turn]) -> Rollout:
        prompts = PromptBatch(
            input_ids=tuple(turn.example.prompt_ids_of(author) for turn in turns),
            index=tuple(turn.example.index for turn in turns),
            sample=tuple(turn.sample for turn in turns),
            chats=tuple(turn.example.chat for turn in turns),
        )
        noise = NoiseStream(self._seed, self._epoch)
        start = time.perf_counter()
        shown = self._progress(f"{author} writes", len(prompts))
        with naming_the_prompts(author, prompts), shown as progress:
            told = self._agreement.progress(progress)
            rollout = self._writer.write(
                author, prompts, self._sampling, noise, self._max_new_tokens, told
            )
        if turns:
            self._unreported.append((rollout, time.perf_counter() - start))
        return rollout

    def _step(self, step: int, rows: list[TrainingRow]) -> Iterator[DistillBatch]:
        """Yield an optimizer step's micro-batches, with the step's counts over all ranks."""
        accumulate = self.shape.accumulate_grad_batches
        if self._delivered >= (step + 1) * accumulate:
            return
        counts = self._reduce_sum(count_by_source(rows))
        sampled = self.lengths.stamp(counts, self._max_new_tokens)
        stamp = partial(replace, step_counts=tuple(counts[0].tolist()), sampled=sampled)
        batches = micro_batches(rows, accumulate)
        for batch in batches[self._delivered - step * accumulate :]:
            self._delivered += 1
            metrics = rollout_metrics(self._unreported) | self._unreported_scores
            self._unreported, self._unreported_scores = [], {}
            none = {name: torch.zeros(len(batch)) for name in self._credits or ()}
            credits = none | dict(batch.credits)  # also where no row of a batch has any
            yield stamp(batch, metrics=metrics, credits=credits)
