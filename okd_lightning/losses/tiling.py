"""Sizes of tiles and blocks, from the vocabulary size and the device.

A *tile* is the positions of one matrix product of the head: large enough to be efficient, small
enough that a few of them fit in memory. A *block* is the part of a tile for vocabulary-wide
arithmetic: on a CPU its buffers stay in the cache, which is several times faster than memory.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

_TILE_ELEMENTS = {"cpu": 2**23, "accelerator": 2**27}
"""Largest number of logits in a tile."""

_BLOCK_ELEMENTS = {"cpu": 2**19, "accelerator": 2**25}
"""Largest number of logits in a block."""


def tile_size(vocab_size: int, device: torch.device) -> int:
    """Return the positions of a tile."""
    return max(1, _of(_TILE_ELEMENTS, device) // vocab_size)


def block_positions(vocab_size: int, device: torch.device) -> int:
    """Return the positions of a block."""
    return max(1, _of(_BLOCK_ELEMENTS, device) // vocab_size)


def slices(total: int, size: int) -> Iterator[slice]:
    """Yield slices of ``size`` positions; one empty slice if there are none."""
    for start in range(0, max(1, total), size):
        yield slice(start, min(start + size, total))


def _of(sizes: dict[str, int], device: torch.device) -> int:
    return sizes["cpu" if device.type == "cpu" else "accelerator"]
