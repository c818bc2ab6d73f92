"""Validation batches: dataset responses, and on-policy responses to a fixed set of prompts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from okd_lightning.engines.engine import Author, ProgressFactory, Writer, silent_progress
from okd_lightning.records.batches import DistillBatch, Example, PromptBatch, Rollout
from okd_lightning.records.noise import NoiseDomain, NoiseStream, hashed_uniform
from okd_lightning.records.rows import given_row, micro_batches, muted, share, written_rows
from okd_lightning.records.sampling import Sampling
from okd_lightning.rollouts.agreement import Agreement, naming_the_prompts


class GivenResponses:
    """This rank's share of dataset responses, in batches of similar lengths.

    Args:
        examples: The tokenized dataset.
        batch_size: Sequences a batch.
        rank: This rank.
        world_size: Ranks; all of them get the same number of batches.
    """

    def __init__(
        self, examples: Sequence[Example], batch_size: int, rank: int = 0, world_size: int = 1
    ) -> None:
        self.examples = examples
        own = [given_row(example) for example in share(examples, rank, world_size)]
        own = own or [muted(given_row(examples[0]))]
        batches = micro_batches(own, _num_batches(len(examples), batch_size, world_size))
        keys = hashed_uniform(NoiseDomain.BATCH_ORDER, np.arange(len(batches)))
        order = keys.argsort(kind="stable")
        self._batches = [batches[i] for i in order]  # early ones have typical lengths

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[DistillBatch]:
        return iter(self._batches)


class OwnResponses:
    """The student's responses to a fixed set of prompts, generated again at every pass.

    The noise is the same at every pass, so that two validations differ only by the student.

    Args:
        examples: The prompts.
        batch_size: Sequences a batch.
        writer: Generates the responses.
        sampling: Temperature, top-k and top-p.
        max_new_tokens: Longest response, in tokens.
        seed: Keys the noise.
        rank: This rank.
        world_size: Ranks; all of them get the same number of batches.
        progress: Shows the progress of generation.
        agreement: Makes all ranks stop together.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        batch_size: int,
        writer: Writer,
        *,
        sampling: Sampling,
        max_new_tokens: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        progress: ProgressFactory = silent_progress,
        agreement: Agreement | None = None,
    ) -> None:
        self.examples = examples
        self._own = list(share(examples, rank, world_size))
        self._batch_size = batch_size
        self._writer = writer
        self._sampling = sampling
        self._max_new_tokens = max_new_tokens
        self._seed = seed
        self._world_size = world_size
        self._progress = progress
        self._agreement = agreement or Agreement()

    def __len__(self) -> int:
        return _num_batches(len(self.examples), self._batch_size, self._world_size)

    def __iter__(self) -> Iterator[DistillBatch]:
        rollout = self._agreement.together(self._write)
        rows = written_rows(self._own, "student", rollout)
        nothing = Rollout(((),), ((),), ("",))
        rows = rows or [muted(row) for row in written_rows(self.examples[:1], "student", nothing)]
        yield from micro_batches(rows, len(self))

    def _write(self) -> Rollout:
        prompts = prompt_batch(self._own)
        shown = self._progress("student writes", len(prompts))
        with naming_the_prompts("student", prompts), shown as progress:
            return self._writer.write(
                "student",
                prompts,
                self._sampling,
                NoiseStream(self._seed, NoiseDomain.VALIDATION),
                self._max_new_tokens,
                self._agreement.progress(progress),
            )


def prompt_batch(examples: Sequence[Example], author: Author = "student") -> PromptBatch:
    """Return one prompt an example: the one that ``author`` reads."""
    return PromptBatch(
        input_ids=tuple(example.prompt_ids_of(author) for example in examples),
        index=tuple(example.index for example in examples),
        sample=(0,) * len(examples),
        chats=tuple(example.chat for example in examples),
    )


def _num_batches(num_examples: int, batch_size: int, world_size: int) -> int:
    rows_of_largest_share = math.ceil(num_examples / world_size)
    return math.ceil(rows_of_largest_share / batch_size)
