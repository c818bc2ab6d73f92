"""Weights of a model in shared memory of two processes: a few slots, each with one copy."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from transformers import PreTrainedModel

from okd_lightning.errors import ConfigError

_ALIGNMENT = 64


def anonymous_file(name: str) -> int:
    """Return the descriptor of a file without a path, which ends with its last process."""
    if hasattr(os, "memfd_create"):  # not limited by the size of /dev/shm, which containers cut
        return os.memfd_create(name)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


@dataclass(frozen=True)
class SharedTensor:
    """Place of a tensor in a slot.

    Attributes:
        name: Its name in the model.
        shape: Its shape.
        dtype: Its number format.
        offset: Its first byte in a slot.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int


@dataclass(frozen=True)
class SlotLayout:
    """Tensors of a slot, and the number of slots.

    Attributes:
        tensors: The tensors, in order.
        slot_bytes: Bytes of a slot.
        num_slots: Slots.
    """

    tensors: tuple[SharedTensor, ...]
    slot_bytes: int
    num_slots: int

    @classmethod
    def of(cls, model: PreTrainedModel, num_slots: int) -> SlotLayout:
        """Return the layout of the tensors that training changes: trained weights and buffers."""
        found, offset = [], 0
        for name, tensor in _changing(model):
            found.append(SharedTensor(name, tuple(tensor.shape), tensor.dtype, offset))
            offset += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        return cls(tuple(found), max(offset, 1), num_slots)


class SharedWeights:
    """Slots in a file that is mapped into the memory of both processes.

    Args:
        file: Descriptor of the file.
        layout: Its slots.
    """

    def __init__(self, file: int, layout: SlotLayout) -> None:
        size = layout.slot_bytes * layout.num_slots
        os.ftruncate(file, size)
        self._memory = mmap.mmap(file, size)
        self._layout = layout

    @torch.no_grad()
    def write(self, model: PreTrainedModel, slot: int) -> None:
        """Copy a model's weights into a slot.

        Raises:
            ConfigError: A weight that was frozen is trained now.
        """
        present = dict(_changing(model))
        new = sorted(present.keys() - {tensor.name for tensor in self._layout.tensors})
        if new:
            raise ConfigError(
                f"{new[0]} was frozen when the run began and is trained now, which the process "
                "that generates ahead of training does not support: leave --data.rollout_lag out"
            )
        tensors = model.state_dict()
        for place, shared in self._views(slot):
            shared.copy_(tensors[place.name])

    @torch.no_grad()
    def read(self, model: PreTrainedModel, slot: int) -> None:
        """Copy a slot into a model."""
        tensors = model.state_dict()
        for place, shared in self._views(slot):
            tensors[place.name].copy_(shared)

    def _views(self, slot: int) -> Iterator[tuple[SharedTensor, Tensor]]:
        start = slot * self._layout.slot_bytes
        for place in self._layout.tensors:
            size = prod(place.shape)
            if size:
                flat = torch.frombuffer(
                    self._memory, dtype=place.dtype, count=size, offset=start + place.offset
                )
                yield place, flat.view(place.shape)


def _changing(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yield trained parameters and stored buffers, each once."""
    stored = model.state_dict().keys()
    yield from ((name, p) for name, p in model.named_parameters() if p.requires_grad)
    yield from ((name, b) for name, b in model.named_buffers() if name in stored)
