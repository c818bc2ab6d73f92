"""Models whose weights stay on disk until somebody asks for a part of them.

Within ``deferred_weights`` a model from a folder or hub id is built without its weights: they are
on torch's ``meta`` device. Whoever has cut the model into shards reads its own rows of each from
the safetensors files, so that the whole model is nowhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from okd_lightning.errors import ConfigError, ModelError
from okd_lightning.models.sources import Source
from okd_lightning.models.weight_checks import Learns

_IS_DEFERRED: ContextVar[bool] = ContextVar("is_deferred", default=False)


@contextmanager
def deferred_weights(is_wanted: bool = True) -> Iterator[None]:
    """Within it ``load_causal_lm`` leaves the weights of folders and hub ids on disk, or not."""
    token = _IS_DEFERRED.set(is_wanted)
    try:
        yield
    finally:
        _IS_DEFERRED.reset(token)


def is_deferred() -> bool:
    """Whether weights are to stay on disk."""
    return _IS_DEFERRED.get()


@dataclass(frozen=True)
class Deferred:
    """Where the weights of a model are, and what is trained of it."""

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
    """The architecture with its parameters on ``meta``; buffers are real.

    ``deferred(model)`` tells what belongs in them.

    Raises:
        ModelError: A quantised model, whose weights are not read by rows.
    """
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(
            f"{option} {source.given!r} is quantised, and its weights cannot be read by rows; use "
            "loading: every_rank"
        )
    with _parameters_on_meta():
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attn_implementation
        )
    model.deferred_from = Deferred(source, option, learns)
    return model.eval()


def deferred(model: nn.Module) -> Deferred | None:
    """Where the weights of such a model are; None where it has them."""
    return getattr(model, "deferred_from", None)


@contextmanager
def stand_ins(model: nn.Module, option: str) -> Iterator[None]:
    """Within it a base without weights has NaN for all of them, so that adapters can be put on it.

    PEFT puts its own weights on the base's device, which must not be ``meta``: they are drawn here
    and now. The stand-ins take no memory: one number a weight, read as often as it has elements.

    Raises:
        ConfigError: An adapter that is made out of the base's weights, such as DoRA or PiSSA.
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


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Every parameter that a module gets goes to ``meta``; not buffers, which are computed."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            empty = torch.empty_like(parameter, device="meta")
            parameter = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
