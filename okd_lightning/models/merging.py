"""Folding an adapter into the layers under it, on the live model."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel


def merge_adapters(model: PreTrainedModel) -> bool:
    """Put plain layers with merged weights in place of all adapters, in place.

    Where embedding and head share their weights and either is adapted, they become two: what is
    merged into one must not reach the other.

    Args:
        model: With adapters that change its layers.

    Returns:
        Whether a shared embedding and head were taken apart: the config's ``tie_word_embeddings``
        has to become False.
    """
    is_taken_apart = _take_apart(model.get_input_embeddings(), model.get_output_embeddings())
    _merge_below(model)
    return is_taken_apart


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
    layer.merge()
    return layer.get_base_layer()
