"""One model's side of the loss: hidden states and head, projected to logits tile by tile.

A *tile* is the positions of one matrix product of the head: large enough to be efficient, small
enough that a few of them fit in memory. A *block* is the part of a tile for vocabulary-wide
arithmetic: on a CPU its buffers stay in the cache, which is several times faster than memory.

A plain linear head is computed by explicit products, so that its weight's gradient is accumulated
in place, and not computed for a frozen weight. Any other module (an adapter on the head, a
quantised layer) is differentiated by autograd, tile by tile.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional

from okd_lightning.losses.cpu_linear import has_fast_linear, matrix_product
from okd_lightning.records.shapes import PositionHidden
from okd_lightning.records.states import States


@runtime_checkable
class Head(Protocol):
    """A head in two steps, so that the matrix product can be differentiated separately.

    Attributes:
        module: From [positions, hidden] to raw outputs; holds all trained parameters of the head.
    """

    @property
    def module(self) -> nn.Module:
        """The model's output layer."""

    def finish(self, raw: Tensor) -> Tensor:
        """Return logits from the module's outputs, element by element, without parameters."""

    def __call__(self, hidden: Tensor) -> Tensor:
        """Apply both steps."""


def _unchanged(raw: Tensor) -> Tensor:
    return raw


@dataclass(frozen=True)
class Side:
    """One model's hidden states and head.

    Attributes:
        hidden: [positions, hidden] the head's inputs that predict the loss tokens.
        head: From hidden states to [positions, vocab] logits; a plain module has no second step.
        width: Number of logits, where it is known: it determines the size of a tile.
        end_ids: Ids of these logits that are one outcome, "the response ends here".
        states: Hidden states and routings taken during the model's passes; None where no quantity
            reads them.
    """

    hidden: PositionHidden
    head: Head | nn.Module
    end_ids: tuple[int, ...] = ()
    width: int = 1
    states: States | None = None

    @property
    def module(self) -> nn.Module:
        """The head's module."""
        return self.head if isinstance(self.head, nn.Module) else self.head.module

    @property
    def finish(self) -> Callable[[Tensor], Tensor]:
        """Function from the module's outputs to logits."""
        return _unchanged if isinstance(self.head, nn.Module) else self.head.finish


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


def slices(total: int, size: int) -> list[slice]:
    """Return slices of ``size`` positions; one empty slice if there are none."""
    return [slice(i, min(i + size, total)) for i in range(0, max(1, total), size)]


def _of(sizes: dict[str, int], device: torch.device) -> int:
    return sizes["cpu" if device.type == "cpu" else "accelerator"]


_HEADROOM = 64.0
"""Factor by which a product over positions is scaled down where the head is in 16 bits."""


class Projection(ABC):
    """Forward and backward pass of one side's head, tile by tile.

    Args:
        side: Hidden states and head.
        width: Number of ids in the logits.

    Attributes:
        finish: Function from the head's raw outputs to logits.
        learns: True if any gradient is needed for this side.
        inputs: Tensors that get gradient: the hidden states and the head's trained parameters.
    """

    def __init__(self, side: Side, width: int) -> None:
        self.side, self.width = side, width
        self.module, self.finish = side.module, side.finish
        self.hidden = side.hidden.detach()
        is_enabled = torch.is_grad_enabled()
        self.trained = [p for p in self.module.parameters() if p.requires_grad and is_enabled]
        self.trains_hidden = side.hidden.requires_grad and is_enabled
        self.learns = self.trains_hidden or bool(self.trained)
        self.inputs: list[Tensor] = [*[side.hidden] * self.trains_hidden, *self.trained]
        self._sums = [_zeros_like(tensor) for tensor in self.inputs]

    @abstractmethod
    def project(self, tile: slice) -> Tensor:
        """Return [tile positions, width or more] raw outputs; the caller may overwrite them."""

    @abstractmethod
    def pull_back(self, tile: slice, gradient: Tensor) -> None:
        """Accumulate the gradient of ``inputs`` from that of the last tile's raw outputs."""

    @property
    def gradients(self) -> list[Tensor]:
        """Gradient of each of ``inputs``, in its type; float32 for a float16 input."""
        return [
            total if tensor.dtype == torch.float16 else total.to(tensor.dtype)
            for total, tensor in zip(self._sums, self.inputs, strict=True)
        ]


class LinearProjection(Projection):
    """``nn.Linear`` without hooks, also under autocast; only the rows of valid ids are used."""

    def __init__(self, side: Side, width: int) -> None:
        super().__init__(side, width)
        assert isinstance(self.module, nn.Linear)
        weight, bias = self.module.weight.detach()[:width], self.module.bias
        dtype = _product_dtype(weight)
        self._weight = weight.to(dtype)
        self._bias = None if bias is None else bias.detach()[:width].to(dtype)
        self._is_fast = dtype == torch.float32 and weight.device.type == "cpu" and has_fast_linear()
        self._product = matrix_product if self._is_fast else functional.linear
        self._outputs: Tensor | None = None

    def project(self, tile: slice) -> Tensor:
        """Return [tile positions, valid ids], in one buffer for all tiles unless oneDNN is used."""
        hidden = self._hidden(tile)
        if self._is_fast:
            return self._product(hidden, self._weight, self._bias)
        if self._outputs is None:
            self._outputs = hidden.new_empty(len(hidden), len(self._weight))
        out = self._outputs[: len(hidden)]
        if self._bias is None:
            return torch.mm(hidden, self._weight.t(), out=out)
        return torch.addmm(self._bias, hidden, self._weight.t(), out=out)

    def pull_back(self, tile: slice, gradient: Tensor) -> None:
        """Accumulate with two matrix products, or one if the weight is frozen."""
        sums = iter(self._sums)
        if self.trains_hidden:
            next(sums)[tile] = self._product(gradient, self._weight.t())
        for parameter in self.trained:
            rows = next(sums)[: self.width]
            if parameter is self.module.bias:
                rows += gradient.sum(0, dtype=rows.dtype)
            elif self._is_fast:
                rows += self._product(gradient.t(), self._hidden(tile).t())
            elif rows.dtype == gradient.dtype:
                rows.addmm_(gradient.t(), self._hidden(tile))
            else:  # a sum over positions may overflow float16
                product = gradient.t() @ (self._hidden(tile) / _HEADROOM)
                rows.add_(product, alpha=_HEADROOM)

    def _hidden(self, tile: slice) -> Tensor:
        return self.hidden[tile].to(self._weight.dtype)


class GraphProjection(Projection):
    """Any module as head, with an autograd graph over one tile at a time."""

    def project(self, tile: slice) -> Tensor:
        """Return [tile positions, vocab], a copy; the graph is kept until ``pull_back``."""
        self._leaf = self.hidden[tile].requires_grad_(self.trains_hidden)
        with torch.set_grad_enabled(self.learns):
            self._raw = self.module(self._leaf)
        return self._raw.detach().clone()

    def pull_back(self, tile: slice, gradient: Tensor) -> None:
        """Accumulate by autograd through the tile's graph."""
        wanted = [*[self._leaf] * self.trains_hidden, *self.trained]
        found = torch.autograd.grad(
            self._raw, wanted, gradient, allow_unused=True, materialize_grads=True
        )
        sums, parts = list(self._sums), list(found)
        if self.trains_hidden:
            sums.pop(0)[tile] = parts.pop(0)
        for total, part in zip(sums, parts, strict=True):
            total += part


def projection(side: Side, width: int) -> Projection:
    """Return the projection for a side's head."""
    module = side.module
    is_plain = type(module) is nn.Linear and not (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
    )
    return LinearProjection(side, width) if is_plain else GraphProjection(side, width)


def _product_dtype(weight: Tensor) -> torch.dtype:
    """Return the type in which a linear layer multiplies: its own, or that of autocast."""
    device = weight.device.type
    if torch.is_autocast_enabled(device) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return weight.dtype


def _zeros_like(tensor: Tensor) -> Tensor:
    """Return zeros to accumulate into, in at least float32."""
    return torch.zeros_like(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))
