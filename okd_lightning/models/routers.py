"""Routers of mixture-of-experts models: their location in the model, and their raw logits.

In some architectures and versions, transformers records the softmax of a router's logits under
their name; its balancing loss then takes a softmax of a softmax. Each router is therefore compared
once with the logits of its own weights.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PretrainedConfig, PreTrainedModel

from okd_lightning.errors import ModelError

_NAMES = ("gate", "router")
_SIZES = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_IS_SOFTMAX: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
"""Routers that were tried, and whether they return a softmax."""


def routers_of(model: PreTrainedModel) -> tuple[nn.Module, ...]:
    """Return the routers of a model's MoE layers, in order.

    Raises:
        ModelError: There are none.
    """
    num = num_experts(model.config)
    found = [
        module
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in _NAMES and num is not None and _linear(module) is not None
    ]
    if not found:
        raise _no_routers(type(model).__name__)
    return tuple(found)


def check_has_experts(config: PretrainedConfig) -> None:
    """Refuse a dense model before its weights are loaded.

    Raises:
        ModelError: The config names no experts.
    """
    if num_experts(config) is None:
        raise _no_routers(next(iter(config.architectures or ()), config.model_type))


def _no_routers(name: str) -> ModelError:
    return ModelError(
        f"{name} has no routers that choose experts by the largest of their logits; leave the "
        "balancing term out, or train a mixture of experts such as Mixtral, Qwen2-MoE, Qwen3-MoE, "
        "OLMoE or gpt-oss"
    )


def num_experts(config: PretrainedConfig) -> int | None:
    """Return the number of experts in the config; None for a dense model."""
    text: Any = config.get_text_config()
    sizes = [getattr(text, name, None) for name in _SIZES]
    return next((size for size in sizes if isinstance(size, int) and size > 1), None)


def raw_logits(router: nn.Module, hidden: Tensor, output: Any) -> tuple[Tensor, Tensor]:
    """Return a router's logits and the experts that it chose, for each token.

    No operation with gradient takes place here: a layer whose activations are recomputed would
    otherwise save more than the recomputation does. A softmax is returned as it is; see
    ``is_softmax``.

    Args:
        router: One of ``routers_of``.
        hidden: Its input.
        output: What it returned: logits or their softmax, and the numbers of the chosen experts; or
            logits alone.

    Returns:
        [tokens, experts] with gradient, and [tokens, top_k].

    Raises:
        ModelError: The chosen experts are not those with the largest logits.
    """
    parts = output if isinstance(output, tuple) else (output,)
    given: Tensor = parts[0]
    chosen = next((p for p in parts if isinstance(p, Tensor) and not p.is_floating_point()), None)
    if chosen is None:
        top = int(getattr(router, "top_k", 0))
        if not top or given.ndim < 2:
            raise _unlike(router)
        chosen = given.detach().topk(top, dim=-1).indices
    if router not in _IS_SOFTMAX:  # once: the comparison waits for the device
        _IS_SOFTMAX[router] = _tried(router, hidden.detach(), given.detach(), chosen)
    return given, chosen


def is_softmax(router: nn.Module) -> bool:
    """Return whether ``raw_logits`` of a router are their softmax already."""
    return _IS_SOFTMAX[router]


def _tried(router: nn.Module, hidden: Tensor, given: Tensor, chosen: Tensor) -> bool:
    """Return whether a router returns the softmax of its logits.

    Raises:
        ModelError: It returns something else, or chooses otherwise.
    """
    linear = _linear(router)
    assert linear is not None
    weight, bias = linear
    with torch.no_grad():
        flat = hidden.reshape(-1, hidden.shape[-1]).to(weight.dtype)
        logits = functional.linear(flat, weight, bias).float()
        chosen = chosen.reshape(len(logits), -1)
        least = logits.gather(1, chosen).amin(-1)
        rest = logits.scatter(1, chosen, -torch.inf).amax(-1)
        rounding = 2e-2 * logits.abs().amax()  # in 16 bits
        is_largest = bool((least >= rest - rounding).all())
        own = given.reshape(logits.shape).float()
        forms = (logits, logits.softmax(-1))
        is_raw, is_soft = ((own - form).abs().amax() <= rounding + 1e-6 for form in forms)
    if hasattr(router, "e_score_correction_bias") or not is_largest or not (is_raw or is_soft):
        raise _unlike(router)
    return not is_raw


def _linear(module: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """Return the weight [experts, hidden] and bias of a router; None for another module."""
    for part in (module, getattr(module, "layer", None)):
        weight = getattr(part, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim == 2 and len(weight) > 1:
            bias = getattr(part, "bias", None)
            return weight, bias if isinstance(bias, Tensor) else None
    return None


def _unlike(router: nn.Module) -> ModelError:
    return ModelError(
        f"{type(router).__name__} does not choose the experts with the largest logits (a bias or "
        "groups balance them, or noise), so that the effect of a balancing term is unknown; "
        "leave it out for this model"
    )
