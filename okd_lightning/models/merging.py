"""Merging adapters into their base layers, on a model in memory."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from okd_lightning.errors import ConfigError


def unfit_adapter(adapter: PeftConfig) -> str | None:
    """Return why an adapter's weights and its base do not give its model; None where they do."""
    if getattr(adapter, "layer_replication", None):
        return (
            "layer_replication makes layers that share the base's weights, which cannot be merged: "
            "give a base with all of the layers"
        )
    start = getattr(adapter, "init_lora_weights", None)
    if isinstance(start, str) and start.startswith("pissa_niter"):
        return (
            f"init_lora_weights {start!r} changes the base's weights by a random approximation "
            "that no file has: use 'pissa', or save the adapter as a LoRA "
            "(path_initial_model_for_weight_conversion of PEFT's save_pretrained)"
        )
    return None


def merge_adapters(model: PreTrainedModel) -> bool:
    """Replace all adapters of ``model`` in place by plain layers with merged weights.

    If embedding and head share their weights and one is adapted, they are untied first: an adapter
    merged into one must not change the other.

    Args:
        model: A model with adapters on its layers.

    Returns:
        True if embedding and head were untied: the caller must set the config's
        ``tie_word_embeddings`` to False.

    Raises:
        ConfigError: PEFT cannot merge one of them.
    """
    is_taken_apart = _take_apart(model.get_input_embeddings(), model.get_output_embeddings())
    _merge_below(model)
    return is_taken_apart


@torch.no_grad()
def merged_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Return a plain model with all adapters merged, to be saved; ``model`` is not changed.

    Weights without an adapter are shared with ``model``; adapted layers are copied one at a time.

    Raises:
        ConfigError: Embedding and head share their weights and one is adapted: a plain model of
            this config cannot have two different tables.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    is_adapted = (_under(embedding), _under(head)) != (embedding, head)
    if is_adapted and _under(embedding).weight is _under(head).weight:
        raise ConfigError(
            "the student shares one table between embedding and head, and its adapter changes "
            "one of them: as a plain model for another engine they cannot be told apart; leave "
            "embed_tokens and lm_head out of the adapter's target_modules, or use the built-in "
            "engine"
        )
    state: dict[str, Tensor] = {}
    _collect(model, "", state)
    with torch.device("meta"):
        plain: PreTrainedModel = type(model)(deepcopy(model.config))
    plain.load_state_dict(state, strict=True, assign=True)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    return plain


def _collect(module: nn.Module, prefix: str, state: dict[str, Tensor]) -> None:
    """Add the state of ``module`` with all adapters below it merged to ``state``."""
    for name, child in module.named_children():
        if isinstance(child, AuxiliaryTrainingWrapper | BaseTunerLayer):
            merged = _plain(deepcopy(child))
            state.update(merged.state_dict(prefix=f"{prefix}{name}."))
        else:
            _collect(child, f"{prefix}{name}.", state)
    own: dict[str, Tensor] = dict(module.named_parameters(recurse=False))
    passing = module._non_persistent_buffers_set
    own |= {n: b for n, b in module.named_buffers(recurse=False) if n not in passing}
    state.update({prefix + name: tensor.detach() for name, tensor in own.items()})


def _merge_below(parent: nn.Module) -> None:
    for name, child in list(parent.named_children()):
        if isinstance(child, AuxiliaryTrainingWrapper | BaseTunerLayer):
            setattr(parent, name, _plain(child))
        else:
            _merge_below(child)


def _take_apart(embedding: nn.Module, head: nn.Module) -> bool:
    plain_embedding, plain_head = _under(embedding), _under(head)
    if plain_embedding.weight is not plain_head.weight:
        return False
    if (plain_embedding, plain_head) == (embedding, head):
        return False
    plain_head.weight = nn.Parameter(plain_head.weight.detach().clone())
    return True


def _under(layer: Any) -> Any:
    if isinstance(layer, BaseTunerLayer):
        return layer.get_base_layer()
    return layer.original_module if isinstance(layer, AuxiliaryTrainingWrapper) else layer


def _plain(layer: Any) -> nn.Module:
    if isinstance(layer, ModulesToSaveWrapper):
        return layer.modules_to_save[layer.active_adapters[0]]
    if isinstance(layer, AuxiliaryTrainingWrapper):
        return _plain(layer.token_adapter)
    try:
        layer.merge()
    except (NotImplementedError, RuntimeError, ValueError) as error:  # such as lora_bias
        raise ConfigError(f"an adapter cannot be merged into its base: {error}") from error
    inner = layer.base_layer  # a second adapter on other parameters of one module (experts)
    return _plain(inner) if isinstance(inner, BaseTunerLayer) else inner
