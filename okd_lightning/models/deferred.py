"""Models whose weights stay on disk until a rank reads its part of them.

Within ``deferred_weights`` a model from a folder or hub id is built with its weights on torch's
``meta`` device. After sharding, each rank reads its own rows of each weight from the safetensors
files, so that no rank holds the whole model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from okd_lightning.errors import ConfigError, ModelError
from okd_lightning.models.multimodal import auto_class
from okd_lightning.models.sources import Source
from okd_lightning.models.weight_checks import Learns

_IS_DEFERRED: ContextVar[bool] = ContextVar("is_deferred", default=False)


@contextmanager
def deferred_weights(is_wanted: bool = True) -> Iterator[None]:
    """Set, within the context, whether ``load_causal_lm`` leaves weights on disk."""
    token = _IS_DEFERRED.set(is_wanted)
    try:
        yield
    finally:
        _IS_DEFERRED.reset(token)


def is_deferred() -> bool:
    """Return whether weights stay on disk."""
    return _IS_DEFERRED.get()


@dataclass(frozen=True)
class Deferred:
    """Location of a model's weights, and the part of the model that is trained."""

    source: Source
    option: str
    learns: Learns


def causal_lm_without_weights(
    source: Source,
    config: PretrainedConfig,
    option: str,
    *,
    dtype: torch.dtype,
    attn_implementation: str | None,
    learns: Learns,
) -> PreTrainedModel:
    """Return the architecture with its parameters on ``meta`` and real buffers.

    ``deferred(model)`` returns the location of the weights.

    Raises:
        ModelError: A quantised model, whose weights cannot be read by rows.
    """
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(
            f"{option} {source.given!r} is quantised, and its weights cannot be read by rows; use "
            "loading: every_rank"
        )
    with init_empty_weights(include_buffers=False):
        model = auto_class(config).from_config(
            config, dtype=dtype, attn_implementation=attn_implementation
        )
    model.tie_weights()  # the context makes one parameter for each name of a tied weight
    model.deferred_from = Deferred(source, option, learns)
    return model.eval()


def deferred(model: nn.Module) -> Deferred | None:
    """Return the location of such a model's weights; None if they are loaded."""
    return getattr(model, "deferred_from", None)


@contextmanager
def stand_ins(model: nn.Module, option: str) -> Iterator[None]:
    """Give a base on ``meta`` NaN weights within the context, so that adapters can be added.

    PEFT creates its weights on the base's device; on ``meta`` they would have no values. The NaN
    weights take no memory: each is one number, expanded.

    Raises:
        ConfigError: An adapter that is computed from the base's weights, such as DoRA or PiSSA.
    """
    places = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.is_meta
    ]
    nothing = {
        id(p): nn.Parameter(
            p.new_full((), torch.nan, device="cpu").expand(p.shape), p.requires_grad
        )
        for _, _, p in places
    }
    for module, name, parameter in places:
        module._parameters[name] = nothing[id(parameter)]
    refusal = (
        "is made out of the base's weights, which loading: by_shard leaves on disk; use loading: "
        "every_rank, or plain LoRA"
    )
    try:
        yield
    except torch.linalg.LinAlgError as error:  # a decomposition of the stand-ins
        raise ConfigError(f"{option}: this adapter {refusal}") from error
    finally:
        for module, name, parameter in places:
            parameter.requires_grad_(nothing[id(parameter)].requires_grad)
            module._parameters[name] = parameter
    made_of_base = [
        name
        for name, parameter in model.named_parameters()
        if places and parameter.requires_grad and not parameter.is_meta and parameter.isnan().any()
    ]
    if made_of_base:
        raise ConfigError(f"{option}: {made_of_base[0]} {refusal}")
