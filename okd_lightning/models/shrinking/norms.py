"""Norms over the residual stream, and the scales that depend on its width.

RMSNorm divides by the root of the mean square over d channels. Of D channels of which D − d are
zero, the mean square is d/D times that of the d channels. Cutting them leaves the result as it is
if weights are multiplied by √(D/d) and eps by D/d. The scales of embeddings (Gemma: √d) and before
the head (MiniCPM3) are measured on both models.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from okd_lightning.models.causal_lm import head_inputs
from okd_lightning.models.shrinking.layers import DecoderLayers, layer_input
from okd_lightning.models.shrinking.sizes import channel_axes, refusal

_EPS_NAMES = ("rms_norm_eps", "norm_eps", "layer_norm_eps", "layer_norm_epsilon")
_TOLERANCE = 0.02
"""Largest relative error at which factors are one scale: above bfloat16's rounding."""


def residual_norms(model: PreTrainedModel) -> list[str]:
    """Return the names of the RMSNorms over the residual stream.

    Raises:
        ModelError: There is a LayerNorm, which subtracts the mean over all channels; or no norm
            with weights; or other sizes depend on the number of channels.
    """
    width = model.config.get_text_config().hidden_size
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(weight := getattr(module, "weight", None), Tensor)
        and weight.shape == (width,)
        and "norm" in f"{name.rpartition('.')[2]} {type(module).__name__}".lower()
    ]
    for name in names:
        if _subtracts_the_mean(model.get_submodule(name)):
            raise refusal(
                model.config,
                "--hidden",
                "its LayerNorm subtracts the mean over all channels, which changes with them",
            )
    of_channels = {axis.module for axis in channel_axes(model)}  # not OLMo 2's norms over heads
    found = [name for name in names if name in of_channels]
    if not found:
        raise refusal(model.config, "--hidden", "its norms have no weights")
    return found


def scale_norms(model: PreTrainedModel, names: list[str], factor: float) -> None:
    """Multiply the outputs of these norms by a factor, in place."""
    with torch.no_grad():
        for name in names:
            module = model.get_submodule(name)
            weight: Any = module.weight
            offset = _offset(module)
            weight.copy_((weight.double() + offset) * factor - offset)


def scale_eps(config: PretrainedConfig, factor: float) -> None:
    """Multiply the eps of a config's norms by a factor, in place."""
    text = config.get_text_config()
    for name in _EPS_NAMES:
        value = getattr(text, name, None)
        if isinstance(value, float):
            setattr(text, name, value * factor)


@torch.no_grad()
def scales(model: PreTrainedModel, norms: list[str]) -> tuple[float, float]:
    """Return the factors from embedding to first layer, and from last norm to head; 1 if neither.

    Args:
        model: On any device.
        norms: From ``residual_norms``.
    """
    kept: dict[str, Tensor] = {}
    first = DecoderLayers.of(model).modules[0]
    handles = [
        first.register_forward_pre_hook(
            lambda module, args, kwargs: kept.update(first=layer_input(args, kwargs)),
            with_kwargs=True,
        )
    ]
    for name in norms:
        handles.append(
            model.get_submodule(name).register_forward_hook(
                lambda module, args, output: kept.update(norm=output)
            )
        )
    num_ids = min(8, model.config.get_text_config().vocab_size)
    ids = torch.arange(num_ids, device=model.device)[None]
    try:
        head_input = head_inputs(model, ids, torch.ones_like(ids))
    finally:
        for handle in handles:
            handle.remove()
    table: Any = model.get_input_embeddings()
    return _ratio(table.weight[ids], kept["first"]), _ratio(kept["norm"], head_input)


def _ratio(before: Tensor, after: Tensor) -> float:
    """Return the factor between two tensors; 1 where it is not one number."""
    if before.shape != after.shape:
        return 1.0
    start, end = before.double(), after.double()
    factor = float((start * end).sum() / start.square().sum().clamp(min=1e-30))
    is_scaled = (end - factor * start).norm() <= _TOLERANCE * end.norm()
    return factor if is_scaled else 1.0


def _subtracts_the_mean(module: nn.Module) -> bool:
    rows = _probe(module)
    with torch.no_grad():
        before, after = module(rows), module(rows + 3.0)
    return bool((before - after).float().norm() < 0.1 * before.float().norm())


def _offset(module: nn.Module) -> float:
    """Return 1 for a norm that multiplies by 1 + weight (Gemma), else 0."""
    zeros = {"weight": torch.zeros_like(module.get_parameter("weight"))}
    with torch.no_grad():
        output = torch.func.functional_call(module, zeros, (_probe(module),))
    return 1.0 if output.float().norm() > 0.1 else 0.0


def _probe(module: nn.Module) -> Tensor:
    weight = module.get_parameter("weight")
    rows = torch.linspace(-1, 1, 2 * len(weight), dtype=weight.dtype, device=weight.device)
    return rows.sin().reshape(2, -1)
