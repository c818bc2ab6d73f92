"""One model's half of the loss layer: hidden states, and the head that reads them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from okd_lightning.records.shapes import PositionHidden


@runtime_checkable
class Head(Protocol):
    """A head in two steps, so that the matrix product can be differentiated by itself.

    Attributes:
        module: From [positions, hidden] to raw outputs; holds all that is trained of the head.
    """

    @property
    def module(self) -> nn.Module:
        """The model's output layer."""

    def finish(self, raw: Tensor) -> Tensor:
        """From the module's outputs to logits, element by element; nothing here is trained."""

    def __call__(self, hidden: Tensor) -> Tensor:
        """Both steps."""


@dataclass(frozen=True)
class Side:
    """One model's half of the loss layer.

    Attributes:
        hidden: [positions, hidden] what its head reads at the masked-in positions.
        head: From hidden states to [positions, vocab] logits; a plain module is its own head.
    """

    hidden: PositionHidden
    head: Head | nn.Module

    @property
    def module(self) -> nn.Module:
        """The head's own module."""
        return self.head if isinstance(self.head, nn.Module) else self.head.module

    def finish(self, raw: Tensor) -> Tensor:
        """Logits from the module's outputs."""
        return raw if isinstance(self.head, nn.Module) else self.head.finish(raw)
