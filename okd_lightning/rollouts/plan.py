"""Rows of an optimizer step before its responses exist: the prompts, and the sources of responses.

The source of a row is the dataset, the student or the teacher. Owns the random choice of GKD (arXiv
2306.13649, Algorithm 1). It is a hash of (seed, step), so that all micro-batches, ranks and resumed
runs make the same choice.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias, TypeVar

from okd_lightning.records.batches import Example, Source
from okd_lightning.records.noise import NoiseDomain, hashed_uniform
from okd_lightning.records.requests import Generator
from okd_lightning.rollouts.loader_shape import LoaderShape
from okd_lightning.rollouts.order import Turn, epoch_turns
from okd_lightning.rollouts.resharing import RowKey

_T = TypeVar("_T")

GENERATORS: tuple[Generator, ...] = ("student", "teacher")

StepSources: TypeAlias = tuple[tuple[Source, ...], ...]
"""Source of each prompt, of each optimizer step."""

StepRows: TypeAlias = list[list[tuple[Turn, Source]]]
"""Rows of each optimizer step: the prompt and the source of its response."""


def share(items: Sequence[_T], rank: int, world_size: int) -> Sequence[_T]:
    """Return the contiguous part of ``items`` of one rank; sizes differ by one at most."""
    return items[len(items) * rank // world_size : len(items) * (rank + 1) // world_size]


@dataclass(frozen=True)
class RolloutPlan:
    """The mix of sources in a run.

    Attributes:
        on_policy_fraction: Share of rows with on-policy samples, in [0, 1].
        off_policy_source: Source of the other rows.
        is_mixed_within_step: False: one random choice for all rows of an optimizer step (GKD).
            True: every step has both kinds, in that proportion.
        share_at: The share by optimizer step, if it changes during the run; None for a constant
            on_policy_fraction.
    """

    on_policy_fraction: float
    off_policy_source: Source = "dataset"
    is_mixed_within_step: bool = False
    share_at: Callable[[int], float] | None = None

    def share(self, step: int) -> float:
        """Return the share of rows with on-policy samples in optimizer step ``step``."""
        return self.on_policy_fraction if self.share_at is None else self.share_at(step)

    @property
    def sources(self) -> frozenset[Source]:
        """All sources that can occur."""
        found: set[Source] = set()
        if self.on_policy_fraction > 0:
            found.add("student")
        if self.on_policy_fraction < 1:
            found.add(self.off_policy_source)
        return frozenset(found)

    @property
    def is_varying(self) -> bool:
        """True if the share changes during the run."""
        return self.share_at is not None

    def assign(self, seed: int, step: int, num_prompts: int) -> tuple[Source, ...]:
        """Return the source of each prompt of an optimizer step.

        Args:
            seed: Keys the random choice.
            step: The optimizer step, counted over the run from 0.
            num_prompts: Prompts of the step.
        """
        share = self.share(step)
        if share in (0.0, 1.0):  # nothing to choose
            return ("student" if share else self.off_policy_source,) * num_prompts
        if not self.is_mixed_within_step:
            is_student = hashed_uniform(NoiseDomain.DATA_SOURCE, seed, step) < share
            return ("student" if is_student else self.off_policy_source,) * num_prompts
        # a random offset: no position of the step is always the dataset's
        offset = float(hashed_uniform(NoiseDomain.DATA_SOURCE, seed, step))
        shares = [int(share * i + offset) for i in range(num_prompts + 1)]
        return tuple(
            "student" if b > a else self.off_policy_source for a, b in itertools.pairwise(shares)
        )


@dataclass(frozen=True)
class StagedPlan:
    """A sequence of plans, for methods that act in a part of the run.

    Attributes:
        stages: First optimizer step and plan of each stage; the first stage begins at 0.
    """

    stages: tuple[tuple[int, RolloutPlan], ...]

    @property
    def sources(self) -> frozenset[Source]:
        """All sources that can occur."""
        return frozenset(source for _, plan in self.stages for source in plan.sources)

    @property
    def is_varying(self) -> bool:
        """True if a share changes during the run."""
        return any(plan.is_varying for _, plan in self.stages)

    def assign(self, seed: int, step: int, num_prompts: int) -> tuple[Source, ...]:
        """Return the source of each prompt of an optimizer step.

        Args:
            seed: Keys the random choice.
            step: The optimizer step, counted over the run from 0.
            num_prompts: Prompts of the step.
        """
        plan = next(plan for start, plan in reversed(self.stages) if start <= step)
        return plan.assign(seed, step, num_prompts)


@dataclass(frozen=True)
class RolloutBatch:
    """The optimizer steps of a rollout batch, over all ranks.

    Attributes:
        epoch: Its epoch.
        first_step: Its first optimizer step in the epoch.
        turns: The prompts of each step.
        sources: Their sources.
        samples_per_prompt: Responses generated to each prompt.
    """

    epoch: int
    first_step: int
    turns: tuple[tuple[Turn, ...], ...]
    sources: StepSources
    samples_per_prompt: int

    @cached_property
    def rows(self) -> StepRows:
        """All rows of each step: every sample of a prompt, or its dataset response."""
        return [
            [
                (Turn(turn.example, turn.sample + k), source)
                for turn, source in zip(turns, sources, strict=True)
                for k in range(1 if source == "dataset" else self.samples_per_prompt)
            ]
            for turns, sources in zip(self.turns, self.sources, strict=True)
        ]

    @property
    def row_sources(self) -> list[str]:
        """The source of each row."""
        return [str(source) for rows in self.rows for _, source in rows]

    @property
    def generators(self) -> set[Generator]:
        """The models that generate for any rank."""
        return {source for sources in self.sources for source in sources if source != "dataset"}

    def rows_of(self, rank: int, world_size: int) -> StepRows:
        """Return a rank's rows of each step."""
        return [list(share(rows, rank, world_size)) for rows in self.rows]

    def turns_of(self, generator: Generator, rank: int, world_size: int) -> list[Turn]:
        """Return the prompts to which a rank generates with a model, in order."""
        steps = self.rows_of(rank, world_size)
        return [turn for step in steps for turn, source in step if source == generator]

    def keys_of(self, rank: int, world_size: int) -> dict[Generator, list[RowKey]]:
        """Return the rows that a rank generates, in order."""
        keys: dict[Generator, list[RowKey]] = {generator: [] for generator in GENERATORS}
        for step, rows in enumerate(self.rows, self.first_step):
            for place, (_, source) in share(list(enumerate(rows)), rank, world_size):
                if source != "dataset":
                    keys[source].append((step, place))
        return keys


@dataclass(frozen=True)
class PlannedRows:
    """The rollout batches of a run, from its prompts and its plan.

    Attributes:
        examples: The tokenized dataset.
        plan: The sources of rows.
        shape: Division of an epoch.
        seed: Keys the order and the choice of sources.
    """

    examples: Sequence[Example]
    plan: RolloutPlan | StagedPlan
    shape: LoaderShape
    seed: int

    def batch(
        self, epoch: int, first_step: int, sources: StepSources | None = None
    ) -> RolloutBatch:
        """Return a rollout batch.

        Args:
            epoch: Its epoch.
            first_step: Its first optimizer step in the epoch.
            sources: Sources that were chosen before; by default the plan chooses them now.
        """
        shape = self.shape
        turns, per_step = self._turns(epoch), shape.prompts_per_step
        steps = range(first_step, min(first_step + shape.steps_per_rollout, shape.steps_per_epoch))
        cut = tuple(tuple(turns[step * per_step : (step + 1) * per_step]) for step in steps)
        if sources is None:
            first = epoch * shape.steps_per_epoch
            sources = tuple(
                self.plan.assign(self.seed, first + step, len(own))
                for step, own in zip(steps, cut, strict=True)
            )
        return RolloutBatch(epoch, first_step, cut, sources, shape.samples_per_prompt)

    def numbered(self, number: int, sources: StepSources | None = None) -> RolloutBatch:
        """Return the rollout batch with a number, counted over the run from 0."""
        epoch, place = divmod(number, self.shape.rollouts_per_epoch)
        return self.batch(epoch, place * self.shape.steps_per_rollout, sources)

    @cached_property
    def _known(self) -> dict[int, list[Turn]]:
        return {}

    def _turns(self, epoch: int) -> list[Turn]:
        """Return an epoch's prompts; two epochs are kept."""
        if epoch not in self._known:
            for old in [number for number in self._known if number < epoch - 1 or number > epoch]:
                del self._known[old]
            self._known[epoch] = epoch_turns(self.examples, self.shape, self.seed, epoch)
        return self._known[epoch]
