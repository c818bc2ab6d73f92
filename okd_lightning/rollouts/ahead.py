"""Rollout batches that are generated while earlier ones are trained on (``data.rollout_lag``).

At the start of rollout batch n, batch n + lag is begun with the student's weights of that moment,
so that the weights of every response are a function of the step, never of the clock. A batch that
is missing (at the start of a run, after a discard, with a larger lag at a resume) is begun or
generated with the present weights. Owns the batches in flight, and their form in checkpoints.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from okd_lightning.engines.ahead import AheadEngine, Answer, Generated
from okd_lightning.records.requests import Generator, Progress, Request, Rollout
from okd_lightning.rollouts.generation import Agreement, Generation, naming_the_prompts, one_rank
from okd_lightning.rollouts.plan import PlannedRows, RolloutBatch, StepSources
from okd_lightning.rollouts.resharing import RowKey, reshared
from okd_lightning.rollouts.stored import pack_rollout, unpack_rollout

Deadline: TypeAlias = Callable[[], float | None]
"""Returns the time (``time.monotonic``) at which a wait ends, None for no end."""


def _no_deadline() -> None:
    return None


@dataclass(frozen=True)
class AheadBatch:
    """A rollout batch whose plan is fixed, and whose responses exist or are being generated.

    Attributes:
        batch: Its rows.
        weights_of: Number of the rollout batch at whose start the weights were taken.
        request: This rank's part of the request; None where no rank has any, or with ``rollout``.
        answer: Its responses, while they are generated.
        rollout: This rank's student responses from a checkpoint.
    """

    batch: RolloutBatch
    weights_of: int
    request: Request | None = None
    answer: Answer | None = None
    rollout: Rollout | None = None

    def wait(
        self, progress: Progress | None = None, until: Deadline = _no_deadline
    ) -> Generated | None:
        """Return this rank's responses; None if they are not finished in time; see ``Answer``."""
        if self.answer is None or self.request is None:
            return Generated(self.rollout or Rollout(), 0.0)
        with naming_the_prompts(self.request):
            return self.answer.wait(progress, until)


class RolloutsAhead:
    """The rollout batches in flight, by number.

    Args:
        lag: Rollout batches between the weights that generate and those that are trained; 0 for
            none.
        start: Starts the engine; None for a lag of 0.
        gather: Collects one object of every rank, on every rank.
    """

    def __init__(
        self,
        lag: int = 0,
        start: Callable[[], AheadEngine] | None = None,
        gather: Callable[[Any], list[Any]] = one_rank,
    ) -> None:
        self.lag = lag
        self.is_used = lag > 0  # or a checkpoint had batches in flight
        self._start = start
        self._agreement = Agreement(gather)  # without a stop: a wait ends by itself
        self._engine: AheadEngine | None = None
        self._batches: dict[int, AheadBatch] = {}
        self._waited = 0.0
        self._generated: dict[int, float] = {}  # seconds by batch

    def get(self, number: int) -> AheadBatch | None:
        """Return a batch, if it was begun."""
        return self._batches.get(number)

    def age(self, number: int) -> int:
        """Return the rollout batches between the weights of a batch and those at its start."""
        own = self._batches.get(number)
        return 0 if own is None else number - own.weights_of

    def drop(self, number: int) -> None:
        """Remove batches up to ``number``, which have been used."""
        self._batches = {n: own for n, own in self._batches.items() if n > number}

    def missing(self, number: int) -> list[int]:
        """Return the batches that are to be in flight during ``number``, and are not."""
        wanted = range(number + 1, number + self.lag + 1)
        return [n for n in wanted if n not in self._batches]

    def begin_missing(self, now: int, rows: PlannedRows, generation: Generation) -> None:
        """Begin the batches that are to be in flight from ``now`` on, with the present weights.

        Args:
            now: The number of the batch that begins to train.
            rows: The rollout batches of the run.
            generation: The run's requests.
        """
        missing = self.missing(now)
        planned = [rows.numbered(number) for number in missing]
        rank, world_size = rows.shape.rank, rows.shape.world_size

        def begin() -> None:
            for number, batch in zip(missing, planned, strict=True):
                request = answer = None
                if "student" in batch.generators:
                    turns = batch.turns_of("student", rank, world_size)
                    request = generation.request("student", turns, batch.epoch)
                    answer = self._running().begin(request)
                self._batches[number] = AheadBatch(batch, now, request, answer)

        if missing:
            generation.agreement.together(begin)

    def _running(self) -> AheadEngine:
        if self._engine is None:
            assert self._start is not None
            self._engine = self._start()
        return self._engine

    def warm_up(self) -> None:
        """Start the engine, which may take seconds, before the first batch is begun."""
        if self._start is not None:
            self._running()

    def wait_for(self, number: int, progress: Progress | None) -> tuple[Generated, float]:
        """Return this rank's student responses of a batch, and the seconds of waiting.

        Raises:
            OKDLightningError: The generation has failed.
        """
        before = self._waited
        generated = self._wait(number, progress)
        assert generated is not None
        return generated, self._waited - before

    def _wait(
        self, number: int, progress: Progress | None = None, until: Deadline = _no_deadline
    ) -> Generated | None:
        """Return this rank's responses of a batch, see ``AheadBatch.wait``; count the seconds."""
        start = time.perf_counter()
        generated = self._batches[number].wait(progress, until)
        self._waited += time.perf_counter() - start
        if generated is not None:
            self._generated[number] = generated.seconds
        return generated

    def settle(self) -> None:
        """Wait, on all ranks, until nothing is in flight, where the engine takes turns.

        All ranks call this before anything else gives the engine weights.

        Raises:
            OKDLightningError: A generation has failed, on some rank.
        """
        if self._engine is not None and self._engine.takes_turns:
            self._agreement.together(self._wait_for_all)

    def _wait_for_all(self, until: Deadline = _no_deadline) -> dict[int, Rollout | None]:
        """Return this rank's responses by batch; None for those that were not finished in time."""
        found: dict[int, Rollout | None] = {}
        for number in sorted(self._batches):
            generated = self._wait(number, until=until)
            found[number] = None if generated is None else generated.rollout
        return found

    # ---------------------------------------------------------------- checkpoints

    def state(self, gather: Callable[[Any], list[Any]], until: Deadline) -> list[dict[str, Any]]:
        """Return the batches of all ranks, after a wait; all ranks call this.

        Args:
            gather: Collects one object of every rank, on every rank.
            until: Returns the time at which the wait ends, and unfinished batches are discarded.
        """
        if not self.is_used:
            return []
        found = self._agreement.together(lambda: self._wait_for_all(until))
        packed = {n: None if own is None else pack_rollout(own) for n, own in found.items()}
        everyone = gather(packed)
        late = [n for n in packed if any(own[n] is None for own in everyone)]
        if late:
            rank_zero_warn(
                f"{len(late)} rollout batches in flight were not finished in the time before the "
                "stop, and are discarded: the resumed run generates them with its own "
                "weights, so that it differs from a run that was not stopped "
                "(--trainer.callbacks+=Preemption --trainer.callbacks.grace_seconds)"
            )
        return [
            {
                "number": number,
                "sources": listed(self._batches[number].batch.sources),
                "weights_of": self._batches[number].weights_of,
                "written": [own[number] for own in everyone],
            }
            for number in packed
            if number not in late
        ]

    def load(self, state: Sequence[Mapping[str, Any]], rows: PlannedRows) -> None:
        """Continue with the batches of a checkpoint, of this or another number of ranks.

        Those to which the run's plan now gives other sources are left out.
        """
        rank, world_size = rows.shape.rank, rows.shape.world_size
        self._batches = {}
        for stored in state:
            batch = kept_batch(rows, stored["number"], stored["sources"])
            if batch is None:
                continue
            parts: list[dict[Generator, Rollout]] = [
                {"student": unpack_rollout(part)} for part in stored["written"]
            ]
            rollout = parts[rank]["student"] if len(parts) == world_size else None
            if rollout is None:
                owners = [batch.keys_of(old, len(parts)) for old in range(len(parts))]
                wanted: dict[Generator, list[RowKey]] = {
                    "student": batch.keys_of(rank, world_size)["student"]
                }
                rollout = reshared(parts, owners, wanted).get("student", Rollout())
            self._batches[stored["number"]] = AheadBatch(
                batch, stored["weights_of"], rollout=rollout
            )
        self.is_used = self.lag > 0 or bool(self._batches)

    def close(self) -> None:
        """End the engine, and log the seconds of waiting; a second call has no effect."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None
            rank_zero_info(
                f"rollouts ahead of training (lag {self.lag}): "
                f"{sum(self._generated.values()):.1f} seconds of generation, of which training, "
                f"validation and checkpoints waited for {self._waited:.1f}"
            )


def kept_batch(
    rows: PlannedRows, number: int, sources: Sequence[Sequence[Any]]
) -> RolloutBatch | None:
    """Return a checkpoint's batch with its stored sources; None where its plan has changed."""
    batch = rows.numbered(number, tuple(map(tuple, sources)))
    has_changed = not rows.plan.is_varying and rows.numbered(number).sources != batch.sources
    return None if has_changed else batch


def listed(sources: StepSources) -> list[list[str]]:
    """Return sources as ``weights_only`` loading accepts them."""
    return [list(map(str, own)) for own in sources]
