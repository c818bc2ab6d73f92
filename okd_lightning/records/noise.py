"""Counter-based random numbers: a pure function of integer keys.

There is no generator state to save, and a row's noise depends neither on its batch nor on its rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum, unique

import numpy as np
import torch
from torch import Tensor

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


@unique
class NoiseDomain(IntEnum):
    """First keys of random numbers, one for each use, so that no two uses share a number.

    The first group are keys of ``hashed_uniform``. The second are epochs of a ``NoiseStream``
    outside training: no training epoch has such a number.
    """

    BATCH_ORDER = 0x42415443
    CALIBRATION_ROWS = 0x43414C49
    DATA_SOURCE = 0x434F494E
    DIAGNOSED_PROMPTS = 0x44494147
    ENGINE_PROBE = 0x50524F42
    PROMPT_ORDER = 0x4F524452
    REQUEST_SEED = 0x53454544
    SHOWN_PROMPTS = 0x53414D50
    VALIDATION_PROMPTS = 0x50534554

    VALIDATION = 2**31
    PAPER_MEASURES = 2**31 + 1
    TASK_MEASURES = 2**31 + 2
    DIAGNOSIS = 2**31 + 3
    CALIBRATION = 2**31 + 4


def hashed_uniform(*keys: int | np.ndarray) -> np.ndarray:
    """Uniform numbers in (0, 1), float64, from integer keys that broadcast against each other.

    The keys are absorbed one by one by the finaliser of SplitMix64 (Steele et al., "Fast
    splittable pseudorandom number generators", OOPSLA 2014).
    """
    with np.errstate(over="ignore"):
        state = np.zeros((), dtype=np.uint64)
        for key in keys:
            state = _mix(state + _GOLDEN + np.asarray(key).astype(np.uint64) * _MIX_1)
    return np.asarray(((state >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52)


def hashed_choice(num_items: int, num_chosen: int, *keys: int) -> list[int]:
    """Choose some of ``num_items`` indices, ascending; equal keys give equal choices.

    Args:
        num_items: Number of indices to choose from.
        num_chosen: Most indices to choose.
        keys: Keys of the choice, such as its purpose and a seed.
    """
    drawn = hashed_uniform(*keys, np.arange(num_items))
    return sorted(drawn.argsort(kind="stable")[:num_chosen].tolist())


@dataclass(frozen=True)
class NoiseStream:
    """The sampling noise of one epoch of one run.

    Attributes:
        seed: The run's seed.
        epoch: Number of the pass over the prompts; validation uses its own constant.
        starts: Tokens that a response already has, by (prompt, sample): its noise continues after
            them.
    """

    seed: int
    epoch: int
    starts: Mapping[tuple[int, int], int] = field(default_factory=dict)

    def uniform(self, index: Sequence[int], sample: Sequence[int], num_positions: int) -> Tensor:
        """Return [rows, num_positions] float64 in (0, 1), keyed by prompt and sample number.

        Args:
            index: The dataset row of each prompt.
            sample: Sample number of each response among those of its prompt.
            num_positions: Tokens of a response, from the first one without noise on.
        """
        rows = np.asarray(index)[:, None], np.asarray(sample)[:, None]
        keys = zip(index, sample, strict=True)
        starts = np.asarray([self.starts.get(key, 0) for key in keys], dtype=np.int64)
        positions = starts[:, None] + np.arange(num_positions)[None, :]
        return torch.from_numpy(hashed_uniform(self.seed, self.epoch, *rows, positions))

    def seeds(self, index: Sequence[int], sample: Sequence[int]) -> list[int]:
        """Return one seed per row, below 2^52, for a sampler with its own noise.

        Keyed like ``uniform``: a response that continues after a tool result gets another seed.
        """
        keys = zip(index, sample, strict=True)
        starts = np.asarray([self.starts.get(key, 0) for key in keys], dtype=np.int64)
        rows = np.asarray(index, dtype=np.int64), np.asarray(sample, dtype=np.int64)
        drawn = hashed_uniform(NoiseDomain.REQUEST_SEED, self.seed, self.epoch, *rows, starts)
        return [int(value) for value in np.atleast_1d(drawn) * 2.0**52]

    def starting_at(self, starts: Mapping[tuple[int, int], int]) -> NoiseStream:
        """Return the stream for responses that have ``starts`` tokens, by (prompt, sample)."""
        return replace(self, starts=starts)


def _mix(state: np.ndarray) -> np.ndarray:
    state = (state ^ (state >> np.uint64(30))) * _MIX_1
    state = (state ^ (state >> np.uint64(27))) * _MIX_2
    return state ^ (state >> np.uint64(31))
