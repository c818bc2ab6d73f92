"""How many positions are handled at once: chosen from the vocabulary and the device.

A *tile* is what a head is multiplied out for: large enough for an efficient matrix product, small
enough that a few of them are no matter. A *block* is what the vocabulary-wide arithmetic of a tile
runs over: on a CPU its few buffers stay in the cache, which is several times faster than memory.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

_TILE_ELEMENTS = {"cpu": 2**23, "accelerator": 2**27}
"""Logits a tile holds at most."""

_BLOCK_ELEMENTS = {"cpu": 2**19, "accelerator": 2**25}
"""Logits a block holds at most."""


def tile_size(vocab_size: int, device: torch.device) -> int:
    """Positions a tile."""
    return max(1, _of(_TILE_ELEMENTS, device) // vocab_size)


def block_positions(vocab_size: int, device: torch.device) -> int:
    """Positions a block."""
    return max(1, _of(_BLOCK_ELEMENTS, device) // vocab_size)


def slices(total: int, size: int) -> Iterator[slice]:
    """Cuts of ``size`` positions; one empty cut where there are none."""
    for start in range(0, max(1, total), size):
        yield slice(start, min(start + size, total))


def _of(sizes: dict[str, int], device: torch.device) -> int:
    return sizes["cpu" if device.type == "cpu" else "accelerator"]
