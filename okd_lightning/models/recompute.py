"""Gradient checkpointing that does not ask for training mode, for a teacher that is in eval mode.

transformers' own acts on layers in training mode only, and putting a layer into training mode also
switches the dropout on that some architectures apply in the layer itself. Here the layer's forward
is recomputed as it is, in whatever mode it is in, wherever gradients are recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from okd_lightning.errors import ConfigError


def recompute_activations(model: PreTrainedModel, option: str) -> None:
    """Keep only the inputs of ``model``'s layers, and run each again in the backward pass.

    The layers have to be deterministic: random streams are not kept for the second run.

    Args:
        model: In eval mode; changed in place.
        option: How the user named it, for messages.

    Raises:
        ConfigError: The architecture has no layers that can be recomputed.
    """
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigError(
            f"{option}: {type(model).__name__} has no layers that can be recomputed; leave "
            "--model.gradient_checkpointing off"
        )
    for layer in layers:
        layer.forward = partial(_recomputed, layer.forward)


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():  # validation and generation, which may write a cache
        return forward(*args, **kwargs)
    run = partial(forward, **kwargs)
    return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False)
