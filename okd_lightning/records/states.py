"""States of a model's layers, and its routers' outputs, taken in the forward passes of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from okd_lightning.records.shapes import PositionHidden

NORMED = -1
"""Layer number of the head's input, the state after the final norm."""


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
