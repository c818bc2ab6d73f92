"""Which modules of a model form a unit: gathered before it runs, freed behind it.

A unit is one block of the architecture, as the model itself names them. What is left (final norm,
head, an embedding that shares the head's weights) belongs to the model as a whole: it is gathered
once a forward pass and stays until the backward pass is through, so that the loss reads the head
from it, whatever the number of its tiles.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from peft import PeftModel
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from transformers.modeling_layers import GradientCheckpointingLayer

from okd_lightning.errors import ConfigError


@dataclass(frozen=True)
class ShardSettings:
    """How shards are kept and computed with.

    Attributes:
        precision: In which number formats a gathered unit computes and gradients are summed.
        reshard_after_forward: Free a block's weights behind its forward pass and gather them again
            for the backward pass.
        offload: Keep the shards (and with them the optimizer's state) in the host's memory.
    """

    precision: MixedPrecisionPolicy = field(default_factory=MixedPrecisionPolicy)
    reshard_after_forward: bool = True
    offload: bool = False


def blocks_of(model: nn.Module, option: str) -> list[nn.Module]:
    """The outermost repeated blocks of a model, in the order in which they stand in it.

    Args:
        model: A transformers model, in PEFT's wrapper or not.
        option: How the user named it, for messages.

    Raises:
        ConfigError: The architecture does not say what its blocks are.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    names = set(getattr(base, "_no_split_modules", None) or ())
    found = [m for m in base.modules() if type(m).__name__ in names and m is not base]
    found = found or [m for m in base.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not found:
        raise ConfigError(
            f"{option}: {type(base).__name__} names no blocks (_no_split_modules) that could be "
            "sharded one by one; use --trainer.strategy ddp"
        )
    inner = {id(m) for block in found for m in block.modules() if m is not block}
    return [block for block in found if id(block) not in inner]


def shard(model: nn.Module, mesh: DeviceMesh, settings: ShardSettings, option: str) -> None:
    """Replace all of a model's parameters by this rank's shards of them, in place.

    Args:
        model: Whole, on any device; the same on all ranks.
        mesh: One dimension, all ranks.
        settings: How.
        option: How the user named it, for messages.

    Raises:
        ConfigError: The model is in shards already and has got parameters that are not, or its
            architecture does not say what its blocks are.
    """
    if isinstance(model, FSDPModule):
        _check_all_sharded(model, option)
        return
    offload = CPUOffloadPolicy() if settings.offload else OffloadPolicy()
    precision = _no_narrower(settings.precision, model)
    blocks = [*blocks_of(model, option), *_lone_embedding(model)]
    for block in blocks:
        fully_shard(
            block,
            mesh=mesh,
            reshard_after_forward=settings.reshard_after_forward,
            mp_policy=precision,
            offload_policy=offload,
        )
    fully_shard(
        model,
        mesh=mesh,
        reshard_after_forward=False,
        mp_policy=precision,
        offload_policy=offload,
    )


def _no_narrower(precision: MixedPrecisionPolicy, model: nn.Module) -> MixedPrecisionPolicy:
    """The policy with gradients of float64 weights summed in float64 where it says float32."""
    is_double = any(p.dtype == torch.float64 and p.requires_grad for p in model.parameters())
    if is_double and precision.reduce_dtype == torch.float32:
        return replace(precision, reduce_dtype=torch.float64)
    return precision


def units_of(model: nn.Module) -> list[FSDPModule]:
    """The units of a sharded model, the model as a whole first; none of a whole one."""
    return [m for m in model.modules() if isinstance(m, FSDPModule)]


def settle_root(model: nn.Module) -> None:
    """Let FSDP know that ``model`` is the whole, before a part of it runs by itself.

    It takes what runs first for the whole, and then refuses the whole: with PEFT's wrapper around
    a teacher, its base may be what runs first.
    """
    if isinstance(model, FSDPModule):
        model._get_fsdp_state()._lazy_init()


def _lone_embedding(model: nn.Module) -> list[nn.Module]:
    """The input embedding where nothing else has its weights: needed for a moment only."""
    if isinstance(model, PeftModel):
        return []
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    if not isinstance(embedding, nn.Embedding) or head is None:
        return []
    own = {id(p) for p in embedding.parameters()}
    holders = [
        m
        for m in model.modules()
        if m is not embedding and any(id(p) in own for p in m.parameters(recurse=False))
    ]
    return [] if holders else [embedding]


def _check_all_sharded(model: nn.Module, option: str) -> None:
    plain = [name for name, p in model.named_parameters() if not isinstance(p.data, DTensor)]
    if plain:
        raise ConfigError(
            f"{option}: {plain[0]} was added after the model had been sharded; make a new "
            "DistillationModule for this method"
        )
