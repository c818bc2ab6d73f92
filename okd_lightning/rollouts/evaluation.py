"""Validation batches: dataset responses, and on-policy responses to a fixed set of prompts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from okd_lightning.records.batches import DistillBatch, Example
from okd_lightning.records.collation import (
    RowReader,
    dataset_row,
    fully_masked,
    micro_batches,
    sampled_row,
    sampled_rows,
)
from okd_lightning.records.noise import NoiseDomain, hashed_uniform
from okd_lightning.records.requests import Response, Rollout
from okd_lightning.rollouts.generation import Generation
from okd_lightning.rollouts.order import Turn
from okd_lightning.rollouts.plan import share


class DatasetResponses:
    """This rank's share of dataset responses, in batches of similar lengths.

    Args:
        examples: The tokenized dataset.
        batch_size: Sequences per batch.
        rank: This rank.
        world_size: Ranks; all of them get the same number of batches.
        teacher_rows: Function from rows to rows as the teacher reads them.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        teacher_rows: RowReader = list,
    ) -> None:
        self.examples = examples
        own = [dataset_row(example) for example in share(examples, rank, world_size)]
        own = teacher_rows(own or [fully_masked(dataset_row(examples[0]))])
        batches = micro_batches(own, _num_batches(len(examples), batch_size, world_size))
        batches = [replace(batch, teachers_present=present_in(examples)) for batch in batches]
        keys = hashed_uniform(NoiseDomain.BATCH_ORDER, np.arange(len(batches)))
        order = keys.argsort(kind="stable")
        self._batches = [batches[i] for i in order]  # early ones have typical lengths

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[DistillBatch]:
        return iter(self._batches)


class StudentResponses:
    """The student's responses to a fixed set of prompts, generated again at every pass.

    The noise is the same at every pass, so that two validations differ only by the student.

    Args:
        examples: The prompts.
        batch_size: Sequences per batch.
        generation: Generates the responses.
        rank: This rank.
        world_size: Ranks; all of them get the same number of batches.
        teacher_rows: Function from rows to rows as the teacher reads them.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        batch_size: int,
        generation: Generation,
        rank: int = 0,
        world_size: int = 1,
        teacher_rows: RowReader = list,
    ) -> None:
        self.examples = examples
        self._own = list(share(examples, rank, world_size))
        self._batch_size = batch_size
        self._generation = generation
        self._world_size = world_size
        self._teacher_rows = teacher_rows

    def __len__(self) -> int:
        return _num_batches(len(self.examples), self._batch_size, self._world_size)

    def __iter__(self) -> Iterator[DistillBatch]:
        rollout = self._generation.agreement.together(self._generate)
        rows = sampled_rows(self._own, "student", rollout)
        empty = sampled_row(self.examples[0], "student", Response((), (), ""))
        rows = self._teacher_rows(rows or [fully_masked(empty)])
        for batch in micro_batches(rows, len(self)):
            yield replace(batch, teachers_present=present_in(self.examples))

    def _generate(self) -> Rollout:
        turns = [Turn(example, 0) for example in self._own]
        return self._generation.respond("student", turns, NoiseDomain.VALIDATION)


def present_in(examples: Sequence[Example]) -> tuple[int, ...]:
    """Return the numbers of the teachers of some rows; none where there is one for all."""
    return tuple(sorted({example.teacher for example in examples} - {-1}))


def _num_batches(num_examples: int, batch_size: int, world_size: int) -> int:
    rows_of_largest_share = math.ceil(num_examples / world_size)
    return math.ceil(rows_of_largest_share / batch_size)
