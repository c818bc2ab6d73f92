"""The HostWeights: a frozen model's weights in host memory, copied to a device for its passes.

Owns the copies. Weights do not change, so the host keeps its own and nothing is copied back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from okd_lightning.errors import ConfigError


class HostWeights:
    """Weights of a frozen model that lie in host memory.

    The head stays on the device after the first pass: the loss applies it, tile by tile, after the
    model's pass. So does an embedding that is tied to the head.

    Args:
        model: The model, on the CPU; another device changes its tensors in place.
        option: How the user named the residence, for messages.

    Raises:
        ConfigError: The model's weights are quantised: their state has further tensors.
    """

    def __init__(self, model: PreTrainedModel, option: str) -> None:
        if getattr(model, "is_quantized", False):
            raise ConfigError(
                f"{option} copies plain weights to the device for each pass, and those of "
                f"{type(model).__name__} are quantised: leave it out"
            )
        head = model.get_output_embeddings()
        self._head = [] if head is None else [*head.parameters(), *head.buffers()]
        of_head = {id(tensor) for tensor in self._head}
        tensors = [*model.parameters(), *model.buffers()]
        self._body = [tensor for tensor in tensors if id(tensor) not in of_head]
        self._host: list[Tensor] = [tensor.data for tensor in self._body]
        self._num_entered = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of the weights that are copied for each pass."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._host)

    @contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        """Keep the model on a device within the block; blocks may be nested."""
        for tensor in self._head:
            if tensor.device != device:
                tensor.data = tensor.data.to(device)
        if self._num_entered == 0:
            self._bring(device)
        self._num_entered += 1
        try:
            yield
        finally:
            self._num_entered -= 1
            if self._num_entered == 0:
                for tensor, kept in zip(self._body, self._host, strict=True):
                    tensor.data = kept

    def _bring(self, device: torch.device) -> None:
        if self._is_host(device):
            return
        if device.type == "cuda" and not self._host[0].is_pinned():
            # copies from pinned memory are several times faster, and overlap with the passes
            self._host = [tensor.pin_memory() for tensor in self._host]
        for tensor, kept in zip(self._body, self._host, strict=True):
            tensor.data = kept.to(device, non_blocking=True, copy=True)

    @staticmethod
    def _is_host(device: torch.device) -> bool:
        return device.type == "cpu"
