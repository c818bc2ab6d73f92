"""Units of a model: modules that are gathered before they run and freed after it.

A unit is one block of the architecture, as named by the model. The rest (final norm, head, an
embedding that shares the head's weights) belongs to the model as a whole: it is gathered once per
forward pass and stays until the backward pass is done, so that the loss can read the head, whatever
its number of tiles.
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

from okd_lightning.errors import ConfigError
from okd_lightning.models.blocks import blocks_of


@dataclass(frozen=True)
class ShardSettings:
    """Settings of shards.

    Attributes:
        precision: Number formats in which a gathered unit computes and gradients are summed.
        reshard_after_forward: Free a block's weights after its forward pass and gather them again
            for the backward pass.
        offload: Keep the shards (and with them the optimizer's state) in the host's memory.
    """

    precision: MixedPrecisionPolicy = field(default_factory=MixedPrecisionPolicy)
    reshard_after_forward: bool = True
    offload: bool = False


def shard(model: nn.Module, mesh: DeviceMesh, settings: ShardSettings, option: str) -> None:
    """Replace all of a model's parameters by this rank's shards of them, in place.

    Args:
        model: A whole model on any device, the same on all ranks.
        mesh: A mesh of one dimension with all ranks.
        settings: Settings of the shards.
        option: Name of the user's option, for messages.

    Raises:
        ConfigError: The model is sharded already and has parameters that are not, or its
            architecture does not name its blocks.
    """
    if isinstance(model, FSDPModule):
        _check_all_sharded(model, option)
        return
    offload = CPUOffloadPolicy() if settings.offload else OffloadPolicy()
    precision = _no_narrower(settings.precision, model)
    blocks = blocks_of(model)
    if not blocks:
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        raise ConfigError(
            f"{option}: {type(base).__name__} names no blocks (_no_split_modules) that could be "
            "sharded one by one; use --trainer.strategy ddp"
        )
    for block in [*blocks, *_lone_embedding(model)]:
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


def shard_whole(module: nn.Module, mesh: DeviceMesh, settings: ShardSettings) -> None:
    """Replace the parameters of a small module by shards, in place: one unit; see ``shard``."""
    if not isinstance(module, FSDPModule):
        fully_shard(
            module,
            mesh=mesh,
            reshard_after_forward=False,
            mp_policy=_no_narrower(settings.precision, module),
            offload_policy=CPUOffloadPolicy() if settings.offload else OffloadPolicy(),
        )


def _no_narrower(precision: MixedPrecisionPolicy, model: nn.Module) -> MixedPrecisionPolicy:
    """Return the policy, with float64 gradient sums for float64 weights where it says float32."""
    is_double = any(p.dtype == torch.float64 and p.requires_grad for p in model.parameters())
    if is_double and precision.reduce_dtype == torch.float32:
        return replace(precision, reduce_dtype=torch.float64)
    return precision


def units_of(model: nn.Module) -> list[FSDPModule]:
    """Return the units of a sharded model, the whole model first; none of an unsharded one."""
    return [m for m in model.modules() if isinstance(m, FSDPModule)]


def settle_root(model: nn.Module) -> None:
    """Mark ``model`` as FSDP's root, before a part of it runs by itself.

    FSDP makes the first module that runs the root, and later refuses the real one. With PEFT's
    wrapper around a teacher, its base may run first.
    """
    if isinstance(model, FSDPModule):
        # private: FSDP2 has no public call for this
        model._get_fsdp_state()._lazy_init()


def _lone_embedding(model: nn.Module) -> list[nn.Module]:
    """Return the input embedding if no other module has its weights: it is needed only briefly."""
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
