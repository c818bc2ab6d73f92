"""Taps: forward hooks that take layer outputs and raw router logits of a model's passes.

Owns their places in a model. The hooks act for one pass at a time, so that a recomputation in the
backward pass takes nothing. ``reading`` chooses the positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from okd_lightning.models.blocks import decoder_blocks
from okd_lightning.models.routers import is_softmax, raw_logits, routers_of
from okd_lightning.records.states import NORMED, Routing, States


class Taps:
    """Hooks that take states and routings of one model's passes over a micro-batch.

    Args:
        model: A causal LM, wrapped or not.
        num_rows: Rows of the micro-batch.
        layers: Layers, numbered as in ``States``.
        reads_routers: Whether the routers are read.

    Raises:
        ModelError: The model has no list of its blocks, or no routers that are understood.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        num_rows: int,
        layers: tuple[int, ...] = (),
        reads_routers: bool = False,
    ) -> None:
        self._num_rows = num_rows
        self._order: Tensor | None = None
        inner = [layer for layer in layers if layer != NORMED]
        self._layers = layers
        self._blocks = decoder_blocks(model, "read layer -1 alone, or ")[1] if inner else ()
        self._inner = inner
        self._routers = routers_of(model) if reads_routers else ()
        self._taken: dict[int, Tensor] = {}
        self._routed: list[tuple[Tensor, Tensor, bool]] = []
        self._states: dict[int, list[Tensor]] = {layer: [] for layer in layers}
        self._routings: list[list[Routing]] = []

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within the context, take the outputs of one forward pass."""
        self._taken, self._routed = {}, []
        with ExitStack() as stack:
            for layer in self._inner:
                block, own = self._blocks[max(layer - 1, 0)], self._taker(layer)
                handle = (
                    block.register_forward_hook(own)
                    if layer
                    else block.register_forward_pre_hook(self._take_input, with_kwargs=True)
                )
                stack.callback(handle.remove)
            for router in self._routers:
                stack.callback(router.register_forward_hook(self._take_routing).remove)
            yield

    def gather(self, hidden: Tensor, before: Tensor, tokens: Tensor, rows: Tensor) -> None:
        """Keep the tapped values at some positions of the flattened pass.

        Args:
            hidden: [batch, seq, hidden] the head's inputs; virtual tokens before them are left out
                of the layers as well.
            before: [positions] those that predict the loss tokens.
            tokens: [tokens] those of real tokens.
            rows: [tokens] the rows of the batch that they belong to.
        """
        num, width = hidden.shape[:2]

        def of_pass(values: Tensor) -> Tensor:
            return values.reshape(num, -1, values.shape[-1])[:, -width:].flatten(0, 1)

        for layer in self._layers:
            state = hidden if layer == NORMED else self._taken[layer]
            self._states[layer].append(of_pass(state).index_select(0, before))
        self._routings.append(
            [
                Routing(
                    _logits(of_pass(logits).index_select(0, tokens), is_soft),
                    of_pass(chosen).index_select(0, tokens),
                    rows,
                    self._num_rows,
                )
                for logits, chosen, is_soft in self._routed
            ]
        )

    def reorder(self, order: Tensor) -> None:
        """Store the permutation from the passes' order of positions to the batch's order."""
        self._order = order

    def states(self) -> States:
        """Return the kept states and routings of all passes."""
        layers = {layer: torch.cat(parts) for layer, parts in self._states.items()}
        if self._order is not None:
            layers = {layer: state[self._order] for layer, state in layers.items()}
        routings = [
            Routing(
                torch.cat([routing.logits for routing in of_layer]),
                torch.cat([routing.chosen for routing in of_layer]),
                torch.cat([routing.row for routing in of_layer]),
                self._num_rows,
            )
            for of_layer in zip(*self._routings, strict=True)
        ]
        return States(layers, routings)

    def _take_input(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        del module
        self._taken[0] = args[0] if args else kwargs["hidden_states"]

    def _taker(self, layer: int) -> Any:
        def take(module: nn.Module, args: Any, output: Any) -> None:
            del module, args
            self._taken[layer] = output[0] if isinstance(output, tuple) else output

        return take

    def _take_routing(self, module: nn.Module, args: Any, output: Any) -> None:
        logits, chosen = raw_logits(module, args[0], output)
        self._routed.append((logits, chosen, is_softmax(module)))


def _logits(values: Tensor, are_softmax: bool) -> Tensor:
    """Return logits: the logarithm of a softmax is one form of them."""
    return values.clamp_min(torch.finfo(values.dtype).tiny).log() if are_softmax else values
