"""Loaders on distinguishable examples, and readers of their batches."""

from __future__ import annotations

import torch

from okd_lightning.engines import Sampling
from okd_lightning.records import SOURCES, Example, Response, Rollout
from okd_lightning.rollouts import LoaderShape, RolloutLoader, RolloutPlan


def make_examples(num: int) -> list[Example]:
    """Row i has i % 4 + 1 prompt tokens and i % 3 + 1 response tokens."""
    return [
        Example(
            index=i,
            prompt_ids=(100 + i,) * (i % 4 + 1),
            prompt_mask=(False,) * (i % 4 + 1),
            response_ids=(200 + i,) * (i % 3 + 1),
            prompt="",
            response="",
        )
        for i in range(num)
    ]


class Scribe:
    """Fake engine whose responses encode prompt, version and generator."""

    def __init__(self) -> None:
        self.version = 0  # of the student's weights
        self.calls: list[tuple] = []

    def respond(self, request):
        prompts = request.prompts
        keys = [prompt.index for prompt in prompts], [prompt.sample for prompt in prompts]
        self.calls.append((request.generator, *map(tuple, keys)))
        noise = request.noise.uniform(*keys, 1)[:, 0].tolist()
        found = []
        for prompt, u in zip(prompts, noise, strict=True):
            row = (1000 + self.version, prompt.index, int(1e6 * u), prompt.sample)
            ids = row[: 3 + int(2 * u)]
            found.append(Response(ids, (-0.125,) * len(ids), "eos" if len(ids) < 4 else "length"))
        return Rollout(tuple(found))


class Ranks:
    """Collectives of ranks that run one after the other: counts are replayed from a first run."""

    def __init__(self, counts: list[torch.Tensor]) -> None:
        self._counts = iter(counts)

    def reduce_sum(self, counts):
        return next(self._counts)


def make_loader(shape: LoaderShape, plan=None, num=10, writer=None, **settings) -> RolloutLoader:
    return RolloutLoader(
        make_examples(num),
        plan or RolloutPlan(1.0),
        shape,
        writer or Scribe(),
        sampling=Sampling(),
        max_new_tokens=4,
        seed=3,
        **settings,
    )


def rows_of(batches) -> list[tuple]:
    """Return index, source, ids, mask and sampler log-probs of every row with loss."""
    rows = []
    for batch in batches:
        for i, length in enumerate(batch.lengths.tolist()):
            if batch.mask[i].any():
                rows.append(
                    (
                        int(batch.index[i]),
                        SOURCES[int(batch.source[i])],
                        tuple(batch.input_ids[i, :length].tolist()),
                        tuple(batch.mask[i, :length].tolist()),
                        tuple(batch.sampler_logprobs[i, :length].tolist()),
                    )
                )
    return rows


def same_batch(a, b) -> bool:
    names = ("input_ids", "lengths", "mask", "source", "index", "sampler_logprobs")
    return (a.step_counts, a.sampled) == (b.step_counts, b.sampled) and all(
        torch.equal(getattr(a, name), getattr(b, name)) for name in names
    )
