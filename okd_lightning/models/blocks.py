"""Blocks of a model: the layers that its architecture repeats, and torch.compile on them.

Owns where an architecture has its blocks. Sharding, compilation and the readers of layers all ask
here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from okd_lightning.errors import ConfigError, ModelError
from okd_lightning.models.multimodal import language_model

_BACKEND: str | Callable[..., Any] = "inductor"


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the outermost blocks of a model, in order; none if the architecture names none.

    Blocks are the modules that transformers never splits over devices (``_no_split_modules``),
    otherwise those that it can recompute. A vision tower has blocks too.

    Args:
        model: A model of transformers, with or without PEFT's wrapper, sharded or not.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    found = [m for m in base.modules() if m is not base and _is_named(m, base)]
    found = found or [m for m in base.modules() if isinstance(m, GradientCheckpointingLayer)]
    inner = {id(m) for block in found for m in block.modules() if m is not block}
    return [block for block in found if id(block) not in inner]


def decoder_blocks(model: nn.Module, advice: str = "") -> tuple[str, tuple[nn.Module, ...]]:
    """Return the blocks of a causal LM's decoder, in order, after the name of their list.

    Args:
        model: A causal LM, with or without PEFT's wrapper, sharded or not.
        advice: Start of the error's advice.

    Raises:
        ModelError: The model has no list of its blocks, or more than one.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(base, PreTrainedModel)
    num = getattr(base.config.get_text_config(), "num_hidden_layers", None)
    inside = set(language_model(base).modules())
    lists = {
        name: module
        for name, module in base.named_modules()
        if module in inside
        and isinstance(module, nn.ModuleList)
        and len(module) == num
        and (not base._no_split_modules or _is_named(module[0], base))
    }
    outer = [n for n in lists if not any(n.startswith(f"{other}.") for other in lists)]
    if len(outer) != 1:
        raise ModelError(
            f"{type(base).__name__}: expected one list of its {num} blocks, found {len(outer)}; "
            f"{advice}give a decoder-only model such as Llama, Qwen or Gemma"
        )
    return outer[0], tuple(lists[outer[0]])


def compile_blocks(*models: PreTrainedModel | None) -> None:
    """Compile every block of some models in place, for rows of any length.

    Embedding, head (run by the loss layer) and parameter names are not changed.

    Args:
        *models: Causal LMs; None is skipped.

    Raises:
        ConfigError: An architecture names no blocks.
    """
    for model in models:
        if model is None:
            continue
        blocks = blocks_of(model)
        if not blocks:
            raise ConfigError(
                f"--model.compile_blocks: {type(model).__name__} does not name its blocks "
                "(_no_split_modules is empty); leave the option out for this pair"
            )
        for block in blocks:
            block.compile(dynamic=True, backend=_BACKEND)


def _is_named(module: nn.Module, base: nn.Module) -> bool:
    """Return whether a module's class, or one that it is derived from, is named as a block."""
    names = set(getattr(base, "_no_split_modules", None) or ())
    # shards are of subclasses, which FSDP2 makes under other names
    return not names.isdisjoint(kind.__name__ for kind in type(module).__mro__)
