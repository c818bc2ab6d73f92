"""One model's inputs to the loss layer: hidden states, head, and what was taken besides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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


NORMED = -1
"""Number of the head's input, the state after the final norm."""


@dataclass(frozen=True)
class Routing:
    """The routers' outputs in one MoE layer, for the real tokens of some rows.

    Attributes:
        logits: [tokens, experts] raw logits, before any softmax; gradient to the model.
        chosen: [tokens, top_k] the experts that each token goes to.
        row: [tokens] row of the batch.
        num_rows: Rows of the batch.
    """

    logits: Tensor
    chosen: Tensor
    row: Tensor
    num_rows: int


@dataclass(frozen=True)
class States:
    """States of one model's layers over a batch, and its routers' outputs.

    Attributes:
        layers: [positions, hidden] states at the positions that predict the loss tokens, by layer:
            0 the embeddings, k after block k, ``NORMED`` the head's input.
        routings: One for each MoE layer, in order.
    """

    layers: Mapping[int, PositionHidden] = field(default_factory=dict)
    routings: Sequence[Routing] = ()


@dataclass(frozen=True)
class Side:
    """One model's hidden states and head.

    Attributes:
        hidden: [positions, hidden] the head's inputs that predict the loss tokens.
        head: From hidden states to [positions, vocab] logits; a plain module has no second step.
        width: Number of logits, where it is known: it determines the size of a tile.
        end_ids: Ids of these logits that are one outcome, "the response ends here".
        states: What was taken of the model's passes besides; None where no quantity reads it.
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

    def finish(self, raw: Tensor) -> Tensor:
        """Return logits from the module's outputs."""
        return raw if isinstance(self.head, nn.Module) else self.head.finish(raw)
