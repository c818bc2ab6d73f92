"""Measured rows of a diagnosis: dataset responses, the student's, and the teacher's."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from okd_lightning.engines import NoiseStream, Sampling
from okd_lightning.records.batches import DistillBatch, Example, TrainingRow
from okd_lightning.records.collation import dataset_row, micro_batches, sampled_rows
from okd_lightning.records.noise import NoiseDomain, hashed_choice
from okd_lightning.records.requests import Generator, Request
from okd_lightning.training.module import DistillationModule


@dataclass(frozen=True)
class Responses:
    """Some rows of one generator.

    Attributes:
        author: "given" (dataset responses), "student" or "teacher".
        rows: Ready to be collated.
        ended: True for each row that ends by itself.
        seconds: Seconds of the generation.
    """

    author: str
    rows: tuple[TrainingRow, ...]
    ended: tuple[bool, ...]
    seconds: float = 0.0

    @property
    def num_tokens(self) -> int:
        """Number of loss tokens."""
        return sum(row.num_loss_tokens for row in self.rows)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each response."""
        return [len(row.input_ids) - row.prompt_length for row in self.rows]

    def batches(self, size: int, device: torch.device) -> Iterator[DistillBatch]:
        """Yield micro-batches of rows of similar length; rows without a loss token are left out."""
        rows = [row for row in self.rows if row.num_loss_tokens]
        if rows:
            # -(-a // b) rounds up
            for batch in micro_batches(rows, -(-len(rows) // size)):
                yield batch.to(device)


def chosen(examples: Sequence[Example], num: int, seed: int) -> list[Example]:
    """Return ``num`` examples from all over a dataset; fewer where it has fewer."""
    return [
        examples[i] for i in hashed_choice(len(examples), num, NoiseDomain.DIAGNOSED_PROMPTS, seed)
    ]


def given_responses(examples: Sequence[Example], eos_ids: Sequence[int]) -> Responses:
    """Return the dataset responses; empty where the dataset holds prompts alone."""
    answered = [example for example in examples if example.response_ids]
    ended = tuple(example.response_ids[-1] in eos_ids for example in answered)
    return Responses("given", tuple(dataset_row(example) for example in answered), ended)


@dataclass(frozen=True)
class ResponseGenerator:
    """Generator of one model's responses; the same seed gives the same responses.

    Attributes:
        module: A module whose models are on their devices.
        sampling: Sampling of the student's responses; the teacher's are from its own distribution.
        max_new_tokens: Longest response.
        seed: Key of the noise.
    """

    module: DistillationModule
    sampling: Sampling
    max_new_tokens: int
    seed: int

    def generate(
        self,
        generator: Generator,
        examples: Sequence[Example],
        sample: int = 0,
        progress: Callable[[float, float], None] | None = None,
    ) -> Responses:
        """Generate responses to some prompts.

        Args:
            generator: The model that generates.
            examples: The prompts.
            sample: Another number gives other responses.
            progress: Called with the generated tokens, and the most that can be.
        """
        most, num_done = len(examples) * self.max_new_tokens, 0

        def count(rows: int, tokens: int = 0) -> None:
            nonlocal num_done
            num_done += tokens
            if progress is not None:
                progress(num_done, most)

        request = Request(
            prompts=tuple(example.prompt_for(generator, sample) for example in examples),
            sampling=self.sampling if generator == "student" else Sampling(),
            noise=NoiseStream(self.seed, NoiseDomain.DIAGNOSIS),
            max_new_tokens=self.max_new_tokens,
            generator=generator,
            progress=count,
        )
        start = time.perf_counter()
        rollout = self.module.respond(request)
        seconds = time.perf_counter() - start
        ended = tuple(response.stop_reason == "eos" for response in rollout)
        rows = sampled_rows(examples, generator, rollout)
        return Responses(generator, tuple(rows), ended, seconds)
