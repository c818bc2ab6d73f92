"""The decoder layers of a model: where they are, and forward passes that skip some of them.

A skipped layer returns its input. No weight is copied, so that any choice of layers is measured on
the one model in memory.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from okd_lightning.models.blocks import decoder_blocks
from okd_lightning.models.causal_lm import head_inputs


@dataclass(frozen=True)
class DecoderLayers:
    """A model's layers, in order.

    Attributes:
        name: Dotted name of their list in the model.
        modules: The layers.
        num_outputs: Length of the tuple that a layer returns; None where it returns a tensor.
    """

    name: str
    modules: tuple[nn.Module, ...]
    num_outputs: int | None

    @classmethod
    def of(cls, model: PreTrainedModel) -> DecoderLayers:
        """Find the layers of a model, and what they return, by a pass over two tokens.

        Raises:
            ModelError: The model has no list of its layers, or more than one.
        """
        name, modules = decoder_blocks(model)
        outputs: list[Any] = []
        handle = modules[0].register_forward_hook(lambda *args: outputs.append(args[-1]))
        try:
            ids = torch.zeros(1, 2, dtype=torch.int64, device=model.device)
            with torch.no_grad():
                head_inputs(model, ids, torch.ones_like(ids))
        finally:
            handle.remove()
        returned = outputs[0] if outputs else None
        return cls(name, modules, len(returned) if isinstance(returned, tuple) else None)

    def __len__(self) -> int:
        return len(self.modules)

    @contextmanager
    def skipping(self, dropped: Collection[int]) -> Iterator[None]:
        """Within the context, the layers with these numbers return their input."""
        skipped = [self.modules[number] for number in dropped]
        before = [vars(module).get("forward") for module in skipped]
        for module in skipped:
            module.forward = self._same
        try:
            yield
        finally:
            for module, forward in zip(skipped, before, strict=True):
                del module.forward
                if forward is not None:
                    module.forward = forward

    def _same(self, *args: Any, **kwargs: Any) -> Any:
        hidden = layer_input(args, kwargs)
        return hidden if self.num_outputs is None else (hidden, *[None] * (self.num_outputs - 1))


def layer_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the hidden states among the arguments of a layer."""
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden


def layer_output(output: Any) -> Tensor:
    """Return the hidden states in what a layer returned."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden
