"""Counter-based noise.

Frozen here: a number is a function of its keys alone; it is uniform in (0, 1); rows, positions,
epochs and seeds that differ in one key, or swap two, are independent.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from okd_lightning.engines import NoiseStream, hashed_uniform
from okd_lightning.records.noise import hashed_choice

NUM = 20_000

GOLDEN = [0.47141042966848035, 0.17427874244488362, 0.25381887540297654, 0.8325694517985981]


def kolmogorov_smirnov(values: np.ndarray) -> float:
    """Largest distance to the uniform distribution's CDF, times sqrt(n): 1.95 has p = 0.001."""
    ordered, num = np.sort(values.ravel()), values.size
    above = np.arange(1, num + 1) / num - ordered
    below = ordered - np.arange(num) / num
    return max(above.max(), below.max()) * num**0.5


def test_numbers_are_a_function_of_their_keys():
    stream = NoiseStream(7, 3)
    whole = stream.uniform([4, 9, 9], [0, 0, 1], 6)
    assert torch.equal(whole, NoiseStream(7, 3).uniform([4, 9, 9], [0, 0, 1], 6))
    assert torch.equal(whole[[2, 0]], stream.uniform([9, 4], [1, 0], 6))
    assert torch.equal(whole[:, :2], stream.uniform([4, 9, 9], [0, 0, 1], 2))


def test_a_choice_is_a_function_of_its_keys():
    chosen = hashed_choice(1000, 100, 7, 3)
    assert chosen == sorted({*chosen}) == hashed_choice(1000, 100, 7, 3)
    assert len(chosen) == 100
    assert set(chosen) < set(hashed_choice(1000, 101, 7, 3))
    assert len({*chosen} & {*hashed_choice(1000, 100, 7, 4)}) < 40
    assert 400 < np.mean(chosen) < 600
    assert hashed_choice(3, 5, 0) == [0, 1, 2]
    assert hashed_choice(3, 0, 0) == []


def test_numbers_do_not_change_between_versions():
    found = NoiseStream(0, 0).uniform([0, 1], [0, 0], 2).flatten().tolist()
    assert found == pytest.approx(GOLDEN, abs=1e-15)


KEYS = {
    "seed": hashed_uniform(np.arange(NUM), 0, 0, 0, 0),
    "epoch": hashed_uniform(7, np.arange(NUM), 0, 0, 0),
    "index": hashed_uniform(7, 0, np.arange(NUM), 0, 0),
    "sample": hashed_uniform(7, 0, 0, np.arange(NUM), 0),
    "position": hashed_uniform(7, 0, 0, 0, np.arange(NUM)),
    "strided": hashed_uniform(7, 0, np.arange(NUM) * 2**32, 0, 0),
    "diagonal": hashed_uniform(7, 0, np.arange(NUM), np.arange(NUM), np.arange(NUM)),
}


@pytest.mark.parametrize("key", KEYS)
def test_uniform_along_every_key(key):
    values = KEYS[key]
    assert values.min() > 0
    assert values.max() < 1
    assert kolmogorov_smirnov(values) < 1.95


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("lag", [1, 2, 256])
def test_neighbours_are_independent(key, lag):
    values = KEYS[key]
    correlation = np.corrcoef(values[:-lag], values[lag:])[0, 1]
    assert abs(correlation) * NUM**0.5 < 4
    pairs = np.floor(values[:-lag] * 8) * 8 + np.floor(values[lag:] * 8)
    counts = np.bincount(pairs.astype(int), minlength=64)
    chi_squared = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    assert chi_squared < 120  # 63 degrees of freedom: p < 1e-5


def test_streams_are_independent_of_each_other():
    names = list(KEYS)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            correlation = np.corrcoef(KEYS[a][1:], KEYS[b][1:])[0, 1]  # [0] is often one key
            assert abs(correlation) * NUM**0.5 < 4.5, (a, b)


def test_keys_do_not_commute():
    grid = hashed_uniform(7, 0, np.arange(100)[:, None], np.arange(100)[None, :], 0)
    off_diagonal = ~np.eye(100, dtype=bool)
    assert len(np.unique(grid)) == grid.size
    assert (grid != grid.T)[off_diagonal].all()


@pytest.mark.parametrize("seed", [0, 2**32 - 1, 2**63 - 1, -1])
def test_any_seed_works(seed):
    assert kolmogorov_smirnov(NoiseStream(seed, 0).uniform(range(50), [0] * 50, 50).numpy()) < 1.95
