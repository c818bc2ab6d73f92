"""Order of prompts: the example and the sample number of each row of an epoch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from okd_lightning.records.batches import Example
from okd_lightning.records.noise import NoiseDomain, hashed_uniform
from okd_lightning.rollouts.loader_shape import LoaderShape


@dataclass(frozen=True)
class Turn:
    """One row of an epoch: its example, and its sample number in that epoch."""

    example: Example
    sample: int


def epoch_turns(
    examples: Sequence[Example], shape: LoaderShape, seed: int, epoch: int
) -> list[Turn]:
    """Return an epoch's prompts: the next ones of an endless sequence of shuffled passes."""
    num, length = shape.prompts_per_epoch, len(examples)
    positions = range(epoch * num, (epoch + 1) * num)
    orders: dict[int, np.ndarray] = {}
    seen: dict[int, int] = {}
    turns = []
    for position in positions:
        number, offset = divmod(position, length)
        if number not in orders:
            keys = hashed_uniform(NoiseDomain.PROMPT_ORDER, seed, number, np.arange(length))
            orders[number] = keys.argsort(kind="stable")
        index = int(orders[number][offset])
        turns.append(Turn(examples[index], seen.get(index, 0) * shape.samples_per_prompt))
        seen[index] = seen.get(index, 0) + 1
    return turns
