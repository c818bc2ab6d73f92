"""Gradient checkpointing in training mode (students) and in eval mode (teachers).

transformers' checkpointing acts on layers in training mode only. A teacher's layers in training
mode would also apply the dropout that some architectures have in the layer itself. Here a layer's
forward is recomputed in its own mode, wherever gradients are recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from okd_lightning.errors import ConfigError
from okd_lightning.losses.cpu_linear import fast_linears


def recompute_activations(model: PreTrainedModel, option: str) -> None:
    """Keep only the inputs of ``model``'s layers, and recompute each layer in the backward pass.

    The random state is restored for the recomputation if a layer is in training mode.

    Args:
        model: Changed in place; a second call changes nothing.
        option: How the user named it, for messages.

    Raises:
        ConfigError: The architecture has no layers that support it.
    """
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigError(
            f"{option}: {type(model).__name__} has no layers that can be recomputed; leave "
            "--model.gradient_checkpointing off"
        )
    for layer in layers:
        forward = layer.forward
        if not (isinstance(forward, partial) and forward.func is _recomputed):
            layer.forward = partial(_recomputed, layer, forward)


def _recomputed(layer: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():  # validation and generation, which may write a cache
        return forward(*args, **kwargs)

    def run(*args: Any) -> Any:
        with fast_linears(layer, learns=True):  # the same kernels in both runs
            return forward(*args, **kwargs)

    return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=layer.training)
