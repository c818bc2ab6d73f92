"""A head's matrix product over tiles of positions, and its gradient, without a graph over them.

A plain linear head is multiplied out by hand, so that its weight's gradient is accumulated in place
and is not computed where it is frozen. Any other module (an adapter on the head, a quantised layer)
is differentiated by autograd, tile by tile.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from okd_lightning.losses.cpu_linear import has_fast_linear, matrix_product
from okd_lightning.losses.side import Side

_HEADROOM = 64.0
"""By how much a product over positions is kept smaller where the head is in 16 bits."""


class Projection(ABC):
    """One side's head, run forwards and backwards over one tile after the other.

    Args:
        side: Whose head it is.
        width: Ids that the logits have.

    Attributes:
        learns: Whether any gradient is wanted of this side.
        inputs: What gradient flows to: the hidden states and the head's trained parameters.
    """

    def __init__(self, side: Side, width: int) -> None:
        self.side, self.width = side, width
        self.module = side.module
        self.hidden = side.hidden.detach()
        is_enabled = torch.is_grad_enabled()
        self.trained = [p for p in self.module.parameters() if p.requires_grad and is_enabled]
        self.trains_hidden = side.hidden.requires_grad and is_enabled
        self.learns = self.trains_hidden or bool(self.trained)
        self.inputs: list[Tensor] = [*[side.hidden] * self.trains_hidden, *self.trained]
        self._sums = [_zeros_like(tensor) for tensor in self.inputs]

    @abstractmethod
    def project(self, tile: slice) -> Tensor:
        """[positions of the tile, width or more] raw outputs; the caller may overwrite them."""

    @abstractmethod
    def pull_back(self, tile: slice, gradient: Tensor) -> None:
        """Add up what a gradient in the last tile's raw outputs means for ``inputs``."""

    @property
    def gradients(self) -> list[Tensor]:
        """The gradient in each of ``inputs``, in its type; in float32 where that is float16."""
        return [
            total if tensor.dtype == torch.float16 else total.to(tensor.dtype)
            for total, tensor in zip(self._sums, self.inputs, strict=True)
        ]


class LinearProjection(Projection):
    """``nn.Linear`` without hooks, under autocast or not; only the rows of valid ids take part."""

    def __init__(self, side: Side, width: int) -> None:
        super().__init__(side, width)
        assert isinstance(self.module, nn.Linear)
        weight, bias = self.module.weight.detach()[:width], self.module.bias
        dtype = _product_dtype(weight)
        self._weight = weight.to(dtype)
        self._bias = None if bias is None else bias.detach()[:width].to(dtype)
        self._is_fast = dtype == torch.float32 and weight.device.type == "cpu" and has_fast_linear()
        self._outputs: Tensor | None = None

    def project(self, tile: slice) -> Tensor:
        """[positions of the tile, valid ids]; where it can be, in one buffer for all tiles."""
        hidden = self._hidden(tile)
        if self._is_fast:
            return matrix_product(hidden, self._weight, self._bias)
        if self._outputs is None:
            self._outputs = hidden.new_empty(len(hidden), len(self._weight))
        out = self._outputs[: len(hidden)]
        if self._bias is None:
            return torch.mm(hidden, self._weight.t(), out=out)
        return torch.addmm(self._bias, hidden, self._weight.t(), out=out)

    def pull_back(self, tile: slice, gradient: Tensor) -> None:
        """Two matrix products, or one where the weight is frozen."""
        sums = iter(self._sums)
        if self.trains_hidden:
            next(sums)[tile] = matrix_product(gradient, self._weight.t())
        for parameter in self.trained:
            rows = next(sums)[: self.width]
            if parameter is self.module.bias:
                rows += gradient.sum(0, dtype=rows.dtype)
            elif self._is_fast:
                rows += matrix_product(gradient.t(), self._hidden(tile).t())
            elif rows.dtype == gradient.dtype:
                rows.addmm_(gradient.t(), self._hidden(tile))
            else:  # a sum over positions may leave float16's range
                product = gradient.t() @ (self._hidden(tile) / _HEADROOM)
                rows.add_(product, alpha=_HEADROOM)

    def _hidden(self, tile: slice) -> Tensor:
        return self.hidden[tile].to(self._weight.dtype)


class GraphProjection(Projection):
    """Any module, with a graph over one tile at a time."""

    def project(self, tile: slice) -> Tensor:
        """[positions of the tile, vocab] a copy; the graph is kept until ``pull_back``."""
        self._leaf = self.hidden[tile].requires_grad_(self.trains_hidden)
        with torch.set_grad_enabled(self.learns):
            self._raw = self.module(self._leaf)
        return self._raw.detach().clone()

    def pull_back(self, tile: slice, gradient: Tensor) -> None:
        """Autograd through the tile's graph."""
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
    """The projection that fits a side's head."""
    module = side.module
    is_plain = type(module) is nn.Linear and not (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
    )
    return LinearProjection(side, width) if is_plain else GraphProjection(side, width)


def _product_dtype(weight: Tensor) -> torch.dtype:
    """In which type a linear layer multiplies: its own, or that of autocast."""
    device = weight.device.type
    if torch.is_autocast_enabled(device) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return weight.dtype


def _zeros_like(tensor: Tensor) -> Tensor:
    """Zeros to add to, float32 where the tensor is half as wide."""
    return torch.zeros_like(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))
