"""Models that were made wider by units of zeros, at scattered places, without a change of output.

Written without the package's code for cuts: it is what that code has to undo.
"""

from __future__ import annotations

import copy
import math

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from okd_lightning.records.sequences import Sequences

VOCAB = 23


def rows(num: int = 6, seed: int = 0) -> list[Sequences]:
    """Return two batches of random rows of different lengths, with loss after the first ids."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for size in (num, num - 1):
        ids = torch.randint(0, VOCAB, (size, 12), generator=generator)
        lengths = torch.tensor([12 - i % 4 for i in range(size)])
        places = torch.arange(12)[None]
        found.append(Sequences(ids, lengths, (places < lengths[:, None]) & (places > 2)))
    return found


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    ids = torch.arange(20).reshape(2, 10) * 5 % VOCAB
    return model.eval()(ids, use_cache=False).logits.double()


def spread(weight: torch.Tensor, dim: int, places: torch.Tensor, size: int) -> torch.Tensor:
    """Entries of an axis at these places of a longer axis; zeros elsewhere."""
    shape = list(weight.shape)
    shape[dim] = size
    return weight.new_zeros(shape).index_copy(dim, places, weight)


def places_of(num: int, size: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(size, generator=generator)[:num].sort().values


def widened(model: PreTrainedModel, fields: dict, axes: dict) -> PreTrainedModel:
    """A copy with other config fields, and weights spread over longer axes.

    Args:
        model: The model.
        fields: New config fields.
        axes: Ending of a weight's name to (axis, places, size), or several of them.
    """
    config = copy.deepcopy(model.config)
    for name, value in fields.items():
        setattr(config, name, value)
    wide = AutoModelForCausalLM.from_config(config).eval()
    state = {}
    for name, weight in model.state_dict().items():
        for ending, spreads in axes.items():
            if name.endswith(ending):
                for dim, places, size in spreads:
                    weight = spread(weight, dim, places, size)
        state[name] = weight.clone()
    wide.load_state_dict(state)
    return wide


def with_more_neurons(model: PreTrainedModel, size: int = 72) -> PreTrainedModel:
    places = places_of(model.config.intermediate_size, size)
    last = {name: [(1, places, size)] for name in ("down_proj.weight", "fc2.weight")}
    first = ("gate_proj.weight", "up_proj.weight", "fc1.weight", "fc1.bias")
    axes = last | {name: [(0, places, size)] for name in first}
    return widened(model, {"intermediate_size": size}, axes)


def with_more_channels(model: PreTrainedModel, size: int, offset: float = 0.0) -> PreTrainedModel:
    """A Llama-like model with more channels: norms' weights × √(d/d′), eps × d/d′.

    Args:
        model: The model, with RMSNorms.
        size: d′.
        offset: 1 for norms that multiply by 1 + weight, and embeddings × √channels (Gemma).
    """
    old = model.config.hidden_size
    places = places_of(old, size)
    outs = ("o_proj.weight", "down_proj.weight", "norm.weight")
    ins = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")
    tables = ("embed_tokens.weight", "lm_head.weight")
    axes = {name: [(0, places, size)] for name in outs}
    axes |= {name: [(1, places, size)] for name in (*ins, *tables)}
    axes |= {"feedforward_layernorm.weight": [(0, places, size)]}
    axes |= {"put_layernorm.weight": [(0, places, size)]}
    axes |= {"attention_layernorm.weight": [(0, places, size)]}
    axes.pop("norm.weight")
    axes |= {"model.norm.weight": [(0, places, size)]}
    eps = model.config.rms_norm_eps * old / size
    fields = {"hidden_size": size, "rms_norm_eps": eps, "head_dim": model.config.head_dim}
    wide = widened(model, fields, axes)
    factor = math.sqrt(old / size)
    is_tied = wide.config.tie_word_embeddings
    with torch.no_grad():
        for name, weight in wide.named_parameters():
            if "layernorm" in name or name == "model.norm.weight":
                is_last = name == "model.norm.weight" and bool(offset) and is_tied
                scaled = (weight + offset) * (1.0 if is_last else factor) - offset
                weight.index_copy_(0, places, scaled[places])
            elif "embed_tokens" in name and offset:
                weight.mul_(factor)
    return wide
