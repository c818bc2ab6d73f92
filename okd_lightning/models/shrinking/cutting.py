"""The student: a new model of the smaller config with the kept part of the teacher's weights.

Every cut is checked: on a few tokens, the student's logits must be those of the teacher with the
dropped layers skipped and the dropped units set to zero. An architecture that uses its sizes in an
unsupported way fails the check and is refused.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from okd_lightning.errors import ModelError
from okd_lightning.models.causal_lm import last_logits
from okd_lightning.models.shrinking.layers import DecoderLayers
from okd_lightning.models.shrinking.norms import residual_norms, scale_eps, scale_norms, scales
from okd_lightning.models.shrinking.selection import Selection, zeroed
from okd_lightning.models.shrinking.sizes import fixed_head_width, set_sizes
from okd_lightning.models.sources import first_line

_INDEX_LISTS = ("mlp_only_layers", "attn_layer_indices")
"""Config fields that list numbers of layers; other lists with one entry per layer are cut."""

_TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3}
"""Largest distance of the check relative to the norm; 0.1 in 16 bits, for deep models."""


def cut_model(
    model: PreTrainedModel,
    layers: DecoderLayers,
    dropped: Sequence[int],
    sizes: Mapping[str, int],
    selection: Selection,
) -> PreTrainedModel:
    """Return the student, in eval mode, in the teacher's number format and on its device.

    Args:
        model: The teacher; unchanged.
        layers: Its layers.
        dropped: Numbers of the layers that are dropped.
        sizes: Config fields that change besides the number of layers, and their new values.
        selection: The units that are kept on the axes of those sizes.

    Raises:
        ModelError: The architecture cannot be cut in this way.
    """
    kept = [number for number in range(len(layers)) if number not in dropped]
    config = cut_config(model.config, len(layers), kept)
    is_narrower = "hidden_size" in sizes
    if not sizes.keys().isdisjoint(("num_attention_heads", "hidden_size")):
        config = set_sizes(config, fixed_head_width(model.config))
    config = set_sizes(config, sizes)
    norms = residual_norms(model) if is_narrower else []
    old_width = model.config.get_text_config().hidden_size
    if is_narrower:
        scale_eps(config, old_width / sizes["hidden_size"])
    student = _with_weights(model, config, _names(layers, kept), selection)
    try:
        _scale_head_norms(student, layers, kept, selection)
        if is_narrower:
            _rescale(model, student, norms, old_width / sizes["hidden_size"])
        is_same = _is_same(model, layers, dropped, selection, student)
    except RuntimeError:  # shapes that do not fit each other
        is_same = False
    if not is_same:
        raise ModelError(
            f"{config.get_text_config().model_type} cannot be cut in this way: the cut model does "
            "not compute what the whole one does without these parts (its code or config uses the "
            "sizes otherwise); try other layers, or leave --hidden, --heads or --intermediate out"
        )
    student.generation_config = copy.deepcopy(model.generation_config)
    return student


def cut_config(config: PretrainedConfig, num_layers: int, kept: Sequence[int]) -> PretrainedConfig:
    """Return a copy of a config for some of the layers: what it says per layer is cut as well.

    Args:
        config: The teacher's.
        num_layers: Its layers.
        kept: Numbers of the layers that stay, ascending.
    """
    changed = copy.deepcopy(config)
    text = changed.get_text_config()
    if len(kept) == num_layers:
        return changed
    place = {old: new for new, old in enumerate(kept)}
    for name, value in list(vars(text).items()):
        if "layer" not in name or not isinstance(value, list | tuple):
            continue
        if name in _INDEX_LISTS:
            setattr(text, name, [place[number] for number in value if number in place])
        elif len(value) == num_layers:
            setattr(text, name, [value[number] for number in kept])
    if isinstance(blocks := getattr(text, "block_types", None), list):  # repeated (RecurrentGemma)
        text.block_types = [blocks[number % len(blocks)] for number in kept]
    if isinstance(first := getattr(text, "first_k_dense_replace", None), int):
        text.first_k_dense_replace = sum(number < first for number in kept)
    if isinstance(depth := getattr(text, "scale_depth", None), float):  # over √layers (MiniCPM3)
        text.scale_depth = depth * math.sqrt(len(kept) / num_layers)
    text.num_hidden_layers = len(kept)
    return changed


def _names(layers: DecoderLayers, kept: Sequence[int]) -> dict[str, str | None]:
    """Map each layer's prefix to its prefix in the student; None if the layer is dropped."""
    place = {old: new for new, old in enumerate(kept)}
    return {
        f"{layers.name}.{old}.": f"{layers.name}.{place[old]}." if old in place else None
        for old in range(len(layers))
    }


def _with_weights(
    model: PreTrainedModel,
    config: PretrainedConfig,
    names: Mapping[str, str | None],
    selection: Selection,
) -> PreTrainedModel:
    """Return a model of ``config`` with the kept part of each weight."""
    kind = config.get_text_config().model_type
    try:
        with init_empty_weights(include_buffers=False):
            student = AutoModelForCausalLM.from_config(
                config, dtype=model.dtype, attn_implementation=model.config._attn_implementation
            )
    except (ValueError, TypeError, RuntimeError, AttributeError) as error:
        raise ModelError(f"{kind} cannot be cut in this way: {first_line(error)}") from error
    state: dict[str, Tensor] = {}
    done: dict[int, Tensor] = {}  # tied weights stay tied
    own = dict(model.named_parameters(remove_duplicate=False))
    first = {id(p): name for name, p in model.named_parameters()}
    for name, value in model.state_dict(keep_vars=True).items():
        prefix = next((p for p in names if name.startswith(p)), "")
        new_prefix = names.get(prefix, "")
        if new_prefix is None:
            continue
        if id(value) not in done:
            cut = selection.cut(first.get(id(own.get(name)), name), value.detach())
            is_shared = cut.data_ptr() == value.data_ptr()
            done[id(value)] = cut.clone() if is_shared else cut
        state[new_prefix + name.removeprefix(prefix)] = done[id(value)]
    wanted = {name: tuple(tensor.shape) for name, tensor in student.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    for name in sorted({n for n, _ in wanted.items() ^ found.items()})[:1]:
        raise ModelError(
            f"{kind} cannot be cut in this way: {name} is {wanted.get(name, 'not there')} in a "
            f"model of the smaller config, and {found.get(name, 'not there')} among the kept "
            "weights (layers that differ by their place); try other --drop_layers"
        )
    student.load_state_dict(state, assign=True)
    student.tie_weights()
    return student.to(model.device).eval()


def _scale_head_norms(
    student: PreTrainedModel, layers: DecoderLayers, kept: Sequence[int], selection: Selection
) -> None:
    """Correct the scale of a norm over all heads after some are cut (OLMo 2)."""
    for axis in selection.axes:
        is_of_heads = axis.blocks[0].kind in ("query", "key")
        if is_of_heads and len(axis.blocks) == 1 and "norm" in axis.parameter:
            name = axis.module
            for old, new in _names(layers, kept).items():
                if new is not None and name.startswith(old):
                    name = new + name.removeprefix(old)
                    break
            block, num_kept = axis.blocks[0], selection.entries(axis).shape[-1]
            scale_norms(student, [name], math.sqrt(block.num_units * block.width / num_kept))


def _rescale(
    model: PreTrainedModel, student: PreTrainedModel, norms: Sequence[str], factor: float
) -> None:
    """Correct the scales of norms, embeddings and head after channels are cut."""
    names = residual_norms(student)
    scale_norms(student, names, math.sqrt(factor))
    (of_teacher, to_head), (of_student, own_to_head) = (
        scales(model, list(norms)),
        scales(student, names),
    )
    table: Any = student.get_input_embeddings()
    head: Any = student.get_output_embeddings()
    with torch.no_grad():
        table.weight.mul_(of_teacher / of_student)
    last = to_head / own_to_head
    if head.weight is table.weight:  # the head must not see the embeddings' factor
        last *= of_student / of_teacher
    if abs(last - 1) > 1e-6:
        scale_norms(student, _last_norm(student, names), last)


def _last_norm(model: PreTrainedModel, norms: Sequence[str]) -> list[str]:
    """Return the norm before the head: the one outside all layers."""
    layers = DecoderLayers.of(model).name
    return [name for name in norms if not name.startswith(f"{layers}.")]


@torch.no_grad()
def _is_same(
    model: PreTrainedModel,
    layers: DecoderLayers,
    dropped: Sequence[int],
    selection: Selection,
    student: PreTrainedModel,
) -> bool:
    """Return whether the student is the teacher without the dropped parts, on a few tokens."""
    num_ids = model.config.get_text_config().vocab_size
    ids = (torch.arange(24, device=model.device).reshape(2, 12) * 7 + 3) % num_ids
    wanted = {"attention_mask": torch.ones_like(ids), "use_cache": False}
    with layers.skipping(dropped), zeroed(model, selection):
        expected = _all_logits(model, ids, wanted)
    found = _all_logits(student, ids, wanted)
    tolerance = _TOLERANCES.get(model.dtype, 0.1)
    return bool((found - expected).norm() <= tolerance * expected.norm())


def _all_logits(model: PreTrainedModel, ids: Tensor, wanted: Mapping[str, Any]) -> Tensor:
    columns = [
        last_logits(model, {"input_ids": ids}, wanted, torch.full_like(ids[:, 0], column))
        for column in range(3, ids.shape[1], 4)
    ]
    return torch.stack(columns).double()
