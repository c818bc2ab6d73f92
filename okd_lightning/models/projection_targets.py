"""Choose the layers of an online module by role: the query and value projections (OKD, § IV-A).

Owns the choice if the user names no ``target_modules``, and the key rows of fused projections.
PEFT's defaults differ in role by architecture: on phi they include the MLP, and on GPT-2, BLOOM or
Falcon their only layer projects queries, keys and values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias, cast

import torch
from peft import LoraConfig, PeftConfig, PeftType
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

QUERY_NAMES = frozenset({"q_proj", "query", "q", "wq", "q_lin", "query_proj", "q_b_proj"})
VALUE_NAMES = frozenset({"v_proj", "value", "v", "wv", "v_lin", "value_proj"})
FUSED_NAMES = frozenset({"c_attn", "query_key_value", "Wqkv", "qkv_proj", "qkv", "kv_b_proj"})

Layout: TypeAlias = tuple[int, Sequence[tuple[str, int]]]
"""Output rows of a fused projection: number of repeats, and (role, rows) in order in each."""


def choose_targets(teacher: PreTrainedModel, config: PeftConfig) -> bool:
    """Fill in ``config.target_modules`` with the teacher's query and value projections.

    Nothing is changed if the user named targets, if the adapter has none (prompt learning), or if
    its targets have other roles by definition ((IA)³).

    Args:
        teacher: The base model, before the adapter is put on it.
        config: Changed in place. If no projection is recognised it stays without targets, and
            PEFT's default for the architecture, or its error, applies.

    Returns:
        True if targets were chosen here.
    """
    has_own_roles = config.is_prompt_learning or config.peft_type == PeftType.IA3
    if has_own_roles or getattr(config, "target_modules", None) is not None:
        return False
    leaves = {name.rpartition(".")[2] for name, _ in teacher.named_modules()}
    query, value, fused = (leaves & names for names in (QUERY_NAMES, VALUE_NAMES, FUSED_NAMES))
    chosen = query | value if query and value else query | fused
    if not (fused or (query and value)):
        return False
    config.target_modules = chosen  # type: ignore[attr-defined]
    return True


def keep_keys(teacher: PreTrainedModel, config: PeftConfig) -> list[str]:
    """Hold the key rows of fused projections at zero in the adapter.

    The rows of B (Hu et al., arXiv 2106.09685: B A is added to the layer's weight) that belong to
    keys are zeroed and their outputs masked, so that no gradient reaches them: the adapter changes
    queries and values only. Applies to plain LoRA, whose output is B's; other adapters train the
    keys too.

    Args:
        teacher: The model with the adapter.
        config: The adapter's config.

    Returns:
        The names of the fused layers whose keys are not adapted.
    """
    layout = fused_layout(teacher.config)
    if type(config) is not LoraConfig or config.use_dora or layout is None:
        return []
    if config.init_lora_weights not in (True, False, "gaussian"):  # others change the base weights
        return []
    masked = set()
    for name, module in teacher.named_modules():
        leaf = name.rpartition(".")[2]
        if isinstance(module, LoraLayer) and leaf in FUSED_NAMES:
            _mask_rows(module, key_rows(layout))
            masked.add(leaf)
    return sorted(masked)


def describe_adapter(teacher: PreTrainedModel, config: PeftConfig, masked: Sequence[str]) -> str:
    """List the layers that an adapter sits on, and whether it adapts keys, in one line.

    Args:
        teacher: The model with the adapter.
        config: The adapter's config.
        masked: Result of ``keep_keys``.
    """
    adapted = [name for name, module in teacher.named_modules() if hasattr(module, "base_layer")]
    leaves = sorted({name.rpartition(".")[2] for name in adapted})
    others = [leaf for leaf in leaves if leaf in FUSED_NAMES and leaf not in masked]
    note = f"; in {', '.join(masked)} the rows of queries and values alone" if masked else ""
    note += f"; {', '.join(others)} projects keys as well" if others else ""
    return f"{type(config).__name__} on {', '.join(leaves)} ({len(adapted)} layers){note}"


def key_rows(layout: Layout) -> Tensor:
    """Mark the output rows of a fused projection that are keys: a boolean [rows]."""
    repeats, roles = layout
    one = [role == "key" for role, size in roles for _ in range(size)]
    return torch.tensor(one * repeats)


def fused_layout(config: PreTrainedConfig) -> Layout | None:
    """Return the layout of an architecture's fused projection; None if unknown."""
    known = _LAYOUTS.get(config.model_type)
    return None if known is None else known(config)


def _mask_rows(layer: LoraLayer, is_key: Tensor) -> None:
    for up in layer.lora_B.values():
        weight = cast(Tensor, up.weight)
        if weight.shape[0] != is_key.shape[0]:
            continue
        if not weight.is_meta:
            with torch.no_grad():
                weight[is_key.to(weight.device)] = 0
        up.register_forward_hook(_MaskedOutput(~is_key))


class _MaskedOutput:
    """A forward hook that multiplies the last axis by a mask; keeps it on the output's device."""

    def __init__(self, keep: Tensor) -> None:
        self.keep = keep

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if self.keep.device != output.device:
            self.keep = self.keep.to(output.device)
        return output * self.keep


def _per_group(num_groups: int, query: int, key: int) -> Layout:
    return num_groups, (("query", query), ("key", key), ("value", key))


def _whole(config: PreTrainedConfig) -> Layout:
    width = config.hidden_size
    return _per_group(1, width, width)


def _per_head(config: PreTrainedConfig) -> Layout:
    width = config.hidden_size // config.num_attention_heads
    return _per_group(config.num_attention_heads, width, width)


def _codegen(config: PreTrainedConfig) -> Layout:
    part = config.hidden_size // 4  # laid out for four TPU cores, values before keys
    return 4, (("query", part), ("value", part), ("key", part))


def _falcon(config: PreTrainedConfig) -> Layout:
    heads, width = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    groups = 1 if config.multi_query else heads
    if config.new_decoder_architecture:
        groups = config.num_kv_heads
    return _per_group(groups, heads // groups * width, width)


def _gpt_bigcode(config: PreTrainedConfig) -> Layout:
    if not config.multi_query:
        return _per_head(config)
    return _per_group(1, config.hidden_size, config.hidden_size // config.num_attention_heads)


def _phi3(config: PreTrainedConfig) -> Layout:
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return _per_group(1, heads * width, groups * width)


def _dbrx(config: PreTrainedConfig) -> Layout:
    width = config.hidden_size // config.num_attention_heads
    return _per_group(1, config.hidden_size, config.attn_config.kv_n_heads * width)


_LAYOUTS: dict[str, Callable[[PreTrainedConfig], Layout]] = {
    "gpt2": _whole,
    "mpt": _whole,
    "bloom": _per_head,
    "gpt_neox": _per_head,
    "gpt_neox_japanese": _per_head,
    "persimmon": _per_head,
    "codegen": _codegen,
    "falcon": _falcon,
    "gpt_bigcode": _gpt_bigcode,
    "phi3": _phi3,
    "dbrx": _dbrx,
}
