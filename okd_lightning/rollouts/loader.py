"""The RolloutLoader: a sized, re-iterable, stateful source of training batches.

Owns the order of prompts, the rollout batches in which responses are generated, and the cursor.
Lightning saves its state with every checkpoint and restores it before the first batch. The state
includes the rollouts of the current rollout batch, so that a resumed run trains on the same
responses. A rollout batch is a whole number of optimizer steps; every rank gets the same number of
batches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from okd_lightning.engines.engine import ProgressFactory, RolloutEngine
from okd_lightning.records.batches import (
    DistillBatch,
    Example,
    TrainingRow,
    count_by_source,
)
from okd_lightning.records.collation import (
    RowReader,
    dataset_row,
    fully_masked,
    micro_batches,
    sampled_rows,
)
from okd_lightning.records.counts import (
    RolloutLengths,
    RolloutReports,
    by_teacher,
    chunk_metrics,
    count_chunks,
)
from okd_lightning.records.requests import Generator, Rollout
from okd_lightning.records.sampling import Sampling
from okd_lightning.rollouts.ahead import RolloutsAhead, kept_batch, listed
from okd_lightning.rollouts.generation import Agreement, Generation, StopRequest, one_rank
from okd_lightning.rollouts.identity import check_same_rows, rows_identity
from okd_lightning.rollouts.loader_shape import LoaderShape
from okd_lightning.rollouts.order import Turn
from okd_lightning.rollouts.plan import (
    GENERATORS,
    PlannedRows,
    RolloutBatch,
    RolloutPlan,
    StagedPlan,
    StepRows,
)
from okd_lightning.rollouts.resharing import reshared, reshared_credits
from okd_lightning.rollouts.scoring import RolloutScorer, SampledResponse
from okd_lightning.rollouts.stored import (
    pack_credits,
    pack_rollout,
    unpack_credits,
    unpack_rollout,
)


class RolloutLoader:
    """Yields an epoch's training batches; see the module's docstring.

    Args:
        examples: The tokenized dataset.
        plan: The sources of rows.
        shape: Division of an epoch.
        engine: Generates the student's and the teacher's responses.
        sampling: Temperature, top-k and top-p.
        max_new_tokens: Longest response, in tokens.
        seed: Keys the order, the choice of sources and the sampling noise.
        reduce_sum: Sums an int64 tensor over all ranks; None for one rank.
        gather: Collects one object of every rank, on every rank.
        progress: Shows the progress of a rollout batch; None for no display.
        score: Gives the student's responses their advantages; None without rewards.
        teacher_rows: From rows to rows as the teacher reads them; None where it reads the same.
        stop: This rank's request to stop, which discards an unfinished rollout batch.
        ahead: Rollout batches that are generated ahead of training; None for none.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        plan: RolloutPlan | StagedPlan,
        shape: LoaderShape,
        engine: RolloutEngine,
        *,
        sampling: Sampling,
        max_new_tokens: int,
        seed: int,
        reduce_sum: Callable[[Tensor], Tensor] | None = None,
        gather: Callable[[Any], list[Any]] = one_rank,
        progress: ProgressFactory | None = None,
        score: RolloutScorer | None = None,
        teacher_rows: RowReader | None = None,
        stop: StopRequest | None = None,
        ahead: RolloutsAhead | None = None,
    ) -> None:
        self.examples = examples
        self.plan = plan
        self.shape = shape
        self._seed = seed
        self._reduce_sum = reduce_sum or (lambda counts: counts)
        self._gather = gather
        self._score = score
        self._teacher_rows = teacher_rows
        agreement = Agreement(gather, stop or StopRequest())
        self._generation = Generation(engine, sampling, max_new_tokens, seed, agreement, progress)
        self.ahead = ahead or RolloutsAhead()
        self._planned = PlannedRows(examples, plan, shape, seed)
        self._epoch = 0
        self._delivered = 0  # micro-batches of this epoch
        self._forget_rollouts(0)
        self.lengths = RolloutLengths()
        self._reports = RolloutReports()

    def __len__(self) -> int:
        return self.shape.steps_per_epoch * self.shape.accumulate_grad_batches

    def __iter__(self) -> Iterator[DistillBatch]:
        if self._delivered >= len(self):
            self.start_at(self._epoch + 1)
        accumulate = self.shape.accumulate_grad_batches
        for batch_start in range(0, self.shape.steps_per_epoch, self.shape.steps_per_rollout):
            batch_end = min(batch_start + self.shape.steps_per_rollout, self.shape.steps_per_epoch)
            if self._delivered >= batch_end * accumulate:
                continue
            if self._first_step != batch_start:
                self._forget_rollouts(batch_start)
            for step, rows in enumerate(self._rollout_batch(), batch_start):
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
        self._forget_rollouts(0)

    def _forget_rollouts(self, batch_start: int) -> None:
        self._rollouts: dict[Generator, Rollout] = {}
        self._credits: dict[str, list[float]] | None = None  # of the student's responses
        self._first_step = batch_start  # first optimizer step of the current rollout batch
        self._is_generated = False  # on all ranks
        self._batch: RolloutBatch | None = None  # its rows, once the plan is fixed

    @property
    def _number(self) -> int:
        """Number of the current rollout batch in the run."""
        place = self._first_step // self.shape.steps_per_rollout
        return self._epoch * self.shape.rollouts_per_epoch + place

    def _current(self) -> RolloutBatch:
        """Return the rows of the current rollout batch, as planned when it was requested."""
        if self._batch is not None:
            return self._batch
        begun = self.ahead.get(self._number) if self.ahead.is_used else None
        return begun.batch if begun else self._planned.batch(self._epoch, self._first_step)

    def state_dict(self) -> dict[str, Any]:
        """Return epoch, cursor, the current rollout batch of all ranks, and those in flight.

        Waits for the latter, until the deadline of a requested stop.
        """
        batch = self._current()
        own = {by: pack_rollout(rollout) for by, rollout in self._rollouts.items()}
        stop = self._generation.agreement.stop
        lag, ahead = self.ahead.lag, self.ahead.state(self._gather, lambda: stop.deadline)
        return {
            "epoch": self._epoch,
            "delivered": self._delivered,
            "accumulate": self.shape.accumulate_grad_batches,
            **self.fingerprint(),
            "sources": batch.row_sources,
            "written_for": self._first_step,
            "written": self._gather(own),
            "credits": self._gather(pack_credits(self._credits)),
            "lengths": self.lengths.state_dict(),
            **({"ahead": ahead, "planned": listed(batch.sources)} if ahead or lag else {}),
        }

    def fingerprint(self) -> dict[str, Any]:
        """Return the numbers that determine the rows of an optimizer step, for ``check_same``."""
        return {"rows_per_step": self.shape.rows_per_step, "identity": self._identity}

    def check_same(self, state: Mapping[str, Any]) -> None:
        """Refuse a checkpoint of other steps or prompts.

        Args:
            state: ``fingerprint`` or ``state_dict`` of the checkpoint.

        Raises:
            ConfigError: The number of rows of an optimizer step, prompts, seed or rollout batches
                differ.
        """
        check_same_rows(state, self.fingerprint(), self.shape)

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
        self._forget_rollouts(state["written_for"])
        self.ahead.load(state.get("ahead", ()), self._planned)
        if "planned" in state:  # chosen earlier, by a share that may have changed since
            self._batch = kept_batch(self._planned, self._number, state["planned"])
        if state.get("sources", own := self._current().row_sources) != own:
            return  # another on-policy share: the responses are generated again
        self._is_generated = any(state["written"])
        self._take(
            [{by: unpack_rollout(part) for by, part in own.items()} for own in state["written"]],
            [unpack_credits(credits) for credits in state["credits"]],
        )

    def _take(
        self,
        written: list[dict[Generator, Rollout]],
        credits: list[dict[str, list[float]] | None],
    ) -> None:
        """Restore this rank's part of a checkpoint's rollout batch."""
        rank, world_size = self.shape.rank, self.shape.world_size
        if len(written) == world_size:
            self._rollouts, self._credits = written[rank], credits[rank]
            return
        batch = self._current()
        owners = [batch.keys_of(old, len(written)) for old in range(len(written))]
        own = batch.keys_of(rank, world_size)
        self._rollouts = reshared(written, owners, own)
        self._credits = reshared_credits(
            credits, [keys["student"] for keys in owners], own["student"]
        )

    @cached_property
    def _num_teachers(self) -> int:
        """Teachers that rows choose among; 0 where there is one for all."""
        return 1 + max(example.teacher for example in self.examples)

    @cached_property
    def _identity(self) -> list[int]:
        return rows_identity(self.examples, self.shape, self._seed)

    def _rollout_batch(self) -> list[list[TrainingRow]]:
        """Return this rank's rows of the current rollout batch, with generated responses."""
        if self.ahead.is_used:
            self.ahead.warm_up()
        self._batch = batch = self._current()
        steps = batch.rows_of(self.shape.rank, self.shape.world_size)
        own = {
            by: [turn for rows in steps for turn, source in rows if source == by]
            for by in GENERATORS
        }
        asked = batch.generators
        if asked and not self._is_generated:
            self._rollouts = self._generation.agreement.together(
                lambda: self._generate_all(own, asked)
            )
            self._is_generated = True
        if self.ahead.is_used:
            self.ahead.drop(self._number)
            self.ahead.begin_missing(self._number, self._planned, self._generation)
        if self._score is not None and self._credits is None:
            self._score_responses(steps, self._score)
        sampled = {}
        for by, rollout in self._rollouts.items():
            credits = self._credits if by == "student" else None
            examples = [turn.example for turn in own[by]]
            sampled[by] = iter(sampled_rows(examples, by, rollout.responses, credits))
        found = []
        for step in steps:
            rows = [
                dataset_row(turn.example) if by == "dataset" else next(sampled[by])
                for turn, by in step
            ]
            rows = rows or [fully_masked(dataset_row(self.examples[0]))]
            found.append(rows if self._teacher_rows is None else self._teacher_rows(rows))
        if "student" in asked:
            counts = self._reduce_sum(count_by_source([row for rows in found for row in rows]))
            self.lengths.begin(self._epoch, self._first_step, counts)
        return found

    def _generate_all(
        self, own: dict[Generator, list[Turn]], asked: set[Generator]
    ) -> dict[Generator, Rollout]:
        """Generate with each model that any rank needs: all ranks gather a sharded one together."""
        found: dict[Generator, Rollout] = {}
        for by, turns in own.items():
            if by == "student" and self.ahead.is_used and self.ahead.get(self._number) is not None:
                found[by] = self._wait(turns)
            elif by in asked:
                found[by] = self._generate(by, turns)
        if not self.ahead.is_used:
            return found
        if self.ahead.lag and "student" in asked:
            self._reports.note({"rollout/lag": float(self.ahead.age(self._number))})
        self.ahead.settle()
        return found

    def _wait(self, turns: list[Turn]) -> Rollout:
        """Return the student's responses that were requested at an earlier rollout batch."""
        with self._generation.shown("waiting for responses", len(turns)) as told:
            generated, waited = self.ahead.wait_for(self._number, told)
        if turns and generated.seconds:
            self._reports.add(generated.rollout, generated.seconds)
            self._reports.note({"rollout/worker_cpu_seconds": generated.cpu_seconds})
            self._reports.waited(waited)
        return generated.rollout

    def _score_responses(self, steps: StepRows, score: RolloutScorer) -> None:
        """Score once per rollout batch on every rank, also on ranks without student responses."""
        first = self._epoch * self.shape.steps_per_epoch + self._first_step
        numbered = [
            (turn, n) for n, rows in enumerate(steps, first) for turn, by in rows if by == "student"
        ]
        rollout = self._rollouts.get("student", ())
        found = [
            SampledResponse(turn.example, turn.sample, response, step)
            for (turn, step), response in zip(numbered, rollout, strict=True)
        ]
        scores = score(found)
        self._credits = scores.credits
        self._reports.note(scores.metrics)

    def _generate(self, generator: Generator, turns: list[Turn]) -> Rollout:
        start = time.perf_counter()
        rollout = self._generation.respond(generator, turns, self._epoch)
        if turns:
            seconds = time.perf_counter() - start
            self._reports.add(rollout, seconds)
            if self.ahead.lag:
                self._reports.waited(seconds)
        return rollout

    def _step(self, step: int, rows: list[TrainingRow]) -> Iterator[DistillBatch]:
        """Yield an optimizer step's micro-batches, with the step's counts over all ranks."""
        accumulate = self.shape.accumulate_grad_batches
        if self._delivered >= (step + 1) * accumulate:
            return
        counts = self._reduce_sum(count_by_source(rows))
        sampled = self.lengths.stamp(counts, self._generation.max_new_tokens)
        counted = {"step_counts": tuple(counts[0].tolist()), "sampled": sampled}
        stamp = partial(replace, **counted)
        if self._num_teachers:
            found = by_teacher(rows, self._num_teachers, self._reduce_sum)
            stamp = partial(stamp, **found)
        if rows[0].aligned is not None:  # then all rows of all ranks have chunks
            of_chunks = self._reduce_sum(count_chunks(rows))
            stamp = partial(stamp, teacher_tokens=tuple(of_chunks[0].tolist()))
            self._reports.note(chunk_metrics(of_chunks))
        batches = micro_batches(rows, accumulate)
        for batch in batches[self._delivered - step * accumulate :]:
            self._delivered += 1
            metrics = self._reports.take()
            none = {name: torch.zeros(len(batch)) for name in self._credits or ()}
            credits = none | dict(batch.credits)  # also where no row of a batch has any
            yield stamp(batch, metrics=metrics, credits=credits)
