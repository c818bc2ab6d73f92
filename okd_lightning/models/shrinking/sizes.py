"""The sizes in a config, and which axes of which weights depend on each: measured, not listed.

The model is built without memory (on torch's ``meta`` device) with one size doubled. An axis that
grows depends on that size, and its growth shows its layout: a fused projection has
several blocks on one axis.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from okd_lightning.errors import ModelError
from okd_lightning.models.sources import first_line

UnitKind: TypeAlias = Literal["neuron", "query", "key", "channel"]

NEURON_SIZES = (
    "intermediate_size",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "ffn_dim",
    "n_inner",
)
"""Config fields that number the neurons of an MLP."""


@dataclass(frozen=True)
class Block:
    """Consecutive units of one kind on an axis.

    Attributes:
        kind: Neurons, query heads, key (and value) heads, or channels of the residual stream.
        num_units: Their number.
        width: Entries of the axis that a unit has, one after the other.
    """

    kind: UnitKind
    num_units: int
    width: int


@dataclass(frozen=True)
class Axis:
    """An axis of a weight that is cut.

    Attributes:
        parameter: Name of the weight in the model.
        dim: Number of the axis.
        blocks: The units on it, from its first entry to its last.
    """

    parameter: str
    dim: int
    blocks: tuple[Block, ...]

    @property
    def module(self) -> str:
        """Name of the module that holds the weight."""
        return self.parameter.rpartition(".")[0]

    @property
    def owner(self) -> str:
        """Name of the module whose units these are: attention, MLP or experts; "" for channels."""
        if self.blocks[0].kind == "channel":
            return ""
        is_layer = self.parameter.endswith((".weight", ".bias"))
        return self.module.rpartition(".")[0] if is_layer else self.module


def set_sizes(config: PretrainedConfig, sizes: Mapping[str, Any]) -> PretrainedConfig:
    """Return a copy of a config with other sizes."""
    changed = copy.deepcopy(config)
    text = changed.get_text_config()
    for name, value in sizes.items():
        setattr(text, name, value)
    return changed


def neuron_sizes(config: PretrainedConfig) -> dict[str, int]:
    """Return the fields that number the neurons of an MLP, as far as a config has them."""
    text = config.get_text_config()
    found = {name: getattr(text, name, None) for name in NEURON_SIZES}
    if "n_inner" in vars(text) and found["n_inner"] is None:
        found["n_inner"] = 4 * text.hidden_size  # GPT-2's default
    return {name: value for name, value in found.items() if isinstance(value, int) and value > 0}


def head_sizes(config: PretrainedConfig) -> tuple[int, int]:
    """Return the numbers of query heads and of key heads; 1 for a model without attention."""
    text = config.get_text_config()
    queries = int(getattr(text, "num_attention_heads", None) or 1)
    return queries, int(getattr(text, "num_key_value_heads", None) or queries)


def fixed_head_width(config: PretrainedConfig) -> dict[str, int]:
    """Return the field that keeps the width of heads when their number or the channels change."""
    text = config.get_text_config()
    has_heads = getattr(text, "num_attention_heads", None) is not None
    if not has_heads or getattr(text, "head_dim", None) is not None:
        return {}
    return {"head_dim": text.hidden_size // text.num_attention_heads}


def neuron_axes(model: PreTrainedModel, size_name: str) -> list[Axis]:
    """Return the axes on which the neurons of one config field are.

    Raises:
        ModelError: The architecture computes other sizes from it.
    """
    size = neuron_sizes(model.config)[size_name]
    grown = _grown(model, {size_name: size}, {size_name: 2 * size})
    num = min((more for _, _, more in grown), default=size)  # RecurrentGemma: half its size
    axes = []
    for parameter, dim, more in grown:
        count, rest = divmod(more, num)
        if rest or size % num or more != _length(model, parameter, dim):
            raise refusal(
                model.config, "--intermediate", f"{parameter} has other units on one axis"
            )
        holder = model.get_submodule(parameter.rpartition(".")[0])
        is_interleaved = not getattr(holder, "is_concatenated", True)  # experts of GPT-OSS
        whole = (Block("neuron", num, count),) if is_interleaved else None
        blocks = whole or (Block("neuron", num, 1),) * count
        axes.append(Axis(parameter, dim, blocks))
    return axes


def head_axes(model: PreTrainedModel) -> list[Axis]:
    """Return the axes on which attention heads are.

    Raises:
        ModelError: The number of heads cannot change without their width, or other sizes change
            with it.
    """
    queries, keys = head_sizes(model.config)
    fixed = fixed_head_width(model.config)
    same = {**fixed, "num_attention_heads": queries}
    more_queries = {**fixed, "num_attention_heads": 2 * queries}
    has_keys = getattr(model.config.get_text_config(), "num_key_value_heads", None) is not None
    if has_keys:
        same["num_key_value_heads"] = more_queries["num_key_value_heads"] = keys
    both = {**more_queries, "num_key_value_heads": 2 * keys} if has_keys else more_queries
    of_queries = {(p, d): more for p, d, more in _grown(model, same, more_queries)}
    axes = []
    for parameter, dim, more in _grown(model, same, both):
        for_queries = of_queries.pop((parameter, dim), 0)
        blocks = _head_blocks(for_queries, more - for_queries, queries, keys)
        if blocks is None or more != _length(model, parameter, dim):
            raise refusal(model.config, "--heads", f"{parameter} has other units on one axis")
        axes.append(Axis(parameter, dim, blocks))
    if not axes or of_queries:
        raise refusal(model.config, "--heads", "its config has no field for the width of a head")
    return axes


def channel_axes(model: PreTrainedModel) -> list[Axis]:
    """Return the axes on which the channels of the residual stream are.

    Raises:
        ModelError: The architecture computes other sizes from their number.
    """
    num = int(model.config.get_text_config().hidden_size)
    fixed = fixed_head_width(model.config)
    axes = []
    grown = _grown(model, {**fixed, "hidden_size": num}, {**fixed, "hidden_size": 2 * num})
    for parameter, dim, more in grown:
        if more != num or num != _length(model, parameter, dim):
            raise refusal(model.config, "--hidden", f"the width of {parameter} is computed from it")
        axes.append(Axis(parameter, dim, (Block("channel", num, 1),)))
    return axes


def refusal(config: PretrainedConfig, option: str, reason: str) -> ModelError:
    """Return the error for a cut that an architecture does not allow."""
    kind = config.get_text_config().model_type
    return ModelError(f"{option}: {kind} cannot be cut in this way ({reason}); leave {option} out")


def _head_blocks(
    for_queries: int, for_keys: int, queries: int, keys: int
) -> tuple[Block, ...] | None:
    """Return the blocks of an axis that grew by these lengths; None for another layout."""
    width, rest = divmod(for_queries, queries)
    key_width, key_rest = divmod(for_keys, keys)
    if rest or key_rest:
        return None
    if not for_keys:
        return (Block("query", queries, width),)
    if not for_queries:
        return (Block("key", keys, key_width),)
    if key_width != 2 * width:
        return None
    return Block("query", queries, width), *(Block("key", keys, width),) * 2  # [q, k, v]


def _grown(
    model: PreTrainedModel, before: Mapping[str, Any], after: Mapping[str, Any]
) -> list[tuple[str, int, int]]:
    """Return (weight, axis, growth) of each axis that is longer with other sizes."""
    option = next(iter(set(after) - {"head_dim"}))
    old, new = _shapes(model, before, option), _shapes(model, after, option)
    if old != _own_shapes(model) or old.keys() != new.keys():
        raise refusal(
            model.config, _OPTIONS.get(option, "--intermediate"), "its weights do not follow it"
        )
    return [
        (name, dim, longer - shape[dim])
        for name, shape in old.items()
        for dim, longer in enumerate(new[name])
        if longer != shape[dim]
    ]


_OPTIONS = {
    "num_attention_heads": "--heads",
    "num_key_value_heads": "--heads",
    "hidden_size": "--hidden",
}


def _shapes(
    model: PreTrainedModel, sizes: Mapping[str, Any], size_name: str
) -> dict[str, torch.Size]:
    try:
        with torch.device("meta"):
            built = AutoModelForCausalLM.from_config(set_sizes(model.config, sizes))
    except (ValueError, TypeError, RuntimeError, AttributeError, AssertionError) as error:
        option = _OPTIONS.get(size_name, "--intermediate")
        raise refusal(model.config, option, first_line(error)) from error
    return {name: p.shape for name, p in built.named_parameters()}


def _own_shapes(model: PreTrainedModel) -> dict[str, torch.Size]:
    return {name: p.shape for name, p in model.named_parameters()}


def _length(model: PreTrainedModel, parameter: str, dim: int) -> int:
    return model.get_parameter(parameter).shape[dim]
