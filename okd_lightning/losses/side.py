"""One model's inputs to the loss layer: hidden states and head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from okd_lightning.records.shapes import PositionHidden


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


@dataclass(frozen=True)
class Side:
    """One model's hidden states and head.

    Attributes:
        hidden: [positions, hidden] the head's inputs that predict the loss tokens.
        head: From hidden states to [positions, vocab] logits; a plain module has no second step.
        width: Number of logits, where it is known: it determines the size of a tile.
        end_ids: Ids of these logits that are one outcome, "the response ends here".
    """

    hidden: PositionHidden
    head: Head | nn.Module
    end_ids: tuple[int, ...] = ()
    width: int = 1

    @property
    def module(self) -> nn.Module:
        """The head's module."""
        return self.head if isinstance(self.head, nn.Module) else self.head.module

    def finish(self, raw: Tensor) -> Tensor:
        """Return logits from the module's outputs."""
        return raw if isinstance(self.head, nn.Module) else self.head.finish(raw)
