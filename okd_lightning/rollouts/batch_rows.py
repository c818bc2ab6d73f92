"""The rows of a rollout batch before its responses exist: prompts and sources of each step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

from okd_lightning.records.batches import Example, Source
from okd_lightning.records.requests import Generator
from okd_lightning.records.rows import share
from okd_lightning.rollouts.loader_shape import LoaderShape
from okd_lightning.rollouts.order import Turn, epoch_turns
from okd_lightning.rollouts.plan import RolloutPlan, StagedPlan
from okd_lightning.rollouts.resharing import RowKey

GENERATORS: tuple[Generator, ...] = ("student", "teacher")

StepSources: TypeAlias = tuple[tuple[Source, ...], ...]
"""Source of each prompt, of each optimizer step."""

StepRows: TypeAlias = list[list[tuple[Turn, Source]]]
"""Rows of each optimizer step: the prompt and the source of its response."""


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
