"""Weights and optimizer states: from shards to whole tensors or folders, and back.

Both checkpoint forms hold the same: the weights of ``weights_to_save``, and the optimizer's state
under the parameter numbers of torch's own ``state_dict``. A file of whole tensors is like that of
an unsharded run; in a folder every rank writes its part of each tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from okd_lightning.checkpoints.folder_index import load_shards
from okd_lightning.checkpoints.folders import OPTIMIZER, WEIGHTS, flat_key, tensors_in

OptimizerState: TypeAlias = dict[str, Any]


def whole(value: Any) -> Any:
    """Return a sharded tensor assembled on all ranks (a collective call), or any other value."""
    if not isinstance(value, DTensor):
        return value
    mesh_device = value.device_mesh.device_type
    on_mesh: Any = value if value.device.type == mesh_device else value.to(mesh_device)
    return on_mesh.full_tensor()


def to_host(value: Any) -> Any:
    """Return ``whole(value)``, detached and on the CPU, without the padding of uneven shards."""
    if not isinstance(value, Tensor):
        return value
    host = whole(value.detach()).cpu()
    is_padded = host.untyped_storage().nbytes() > host.nbytes
    return host.clone() if is_padded else host


def like(value: Tensor, pattern: Tensor) -> Tensor:
    """Shard a whole tensor, which all ranks have, like ``pattern``; nothing is sent."""
    if not isinstance(pattern, DTensor) or value.shape != pattern.shape:
        return value
    mesh = pattern.device_mesh
    return distribute_tensor(
        value.to(mesh.device_type), mesh, pattern.placements, src_data_rank=None
    )


@torch.no_grad()
def fill(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into a sharded one, in place."""
    new = like(value, target)
    if isinstance(target, DTensor) and isinstance(new, DTensor):
        target.to_local().copy_(new.to_local())
    else:
        target.copy_(new)


def optimizer_parts(state: OptimizerState) -> tuple[OptimizerState, dict[str, Tensor]]:
    """Split an optimizer's ``state_dict``: its groups, and its tensors under ``number.name``."""
    tensors = {
        flat_key(str(number), name): torch.as_tensor(value)
        for number, values in state["state"].items()
        for name, value in values.items()
    }
    return {"param_groups": state["param_groups"]}, tensors


def map_state(state: OptimizerState, function: Callable[[Any], Any]) -> OptimizerState:
    """Return an optimizer's ``state_dict`` with ``function`` applied to every state value."""
    mapped = {
        number: {name: function(value) for name, value in values.items()}
        for number, values in state["state"].items()
    }
    return {**state, "state": mapped}


def load_whole_optimizer(optimizer: Optimizer, state: OptimizerState) -> None:
    """Load a state of whole tensors; each rank keeps its part."""
    parameters = _numbered(optimizer)
    mapped = {
        int(number): {
            name: like(value, parameters[int(number)]) if isinstance(value, Tensor) else value
            for name, value in values.items()
        }
        for number, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": mapped})


def write_folder(
    folder: Path, weights: Mapping[str, Tensor], optimizers: list[dict[str, Tensor]]
) -> None:
    """Write this rank's part of all tensors (a collective call)."""
    state = {flat_key(WEIGHTS, name): value for name, value in weights.items()}
    for number, tensors in enumerate(optimizers):
        state |= {flat_key(OPTIMIZER, str(number), key): v for key, v in tensors.items()}
    dcp.save(state, checkpoint_id=folder)


def read_folder(
    folder: Path,
    weights: Mapping[str, Tensor],
    optimizers: list[Optimizer],
    groups: list[OptimizerState],
) -> None:
    """Read this rank's part of all tensors, independent of the number of ranks that wrote them.

    Args:
        folder: A folder written by ``write_folder``.
        weights: Weights to fill in place; the folder must hold them all.
        optimizers: Optimizers whose states are replaced.
        groups: The first part of ``optimizer_parts`` of each.
    """
    state = {flat_key(WEIGHTS, name): value for name, value in weights.items()}
    saved = tensors_in(folder)
    for number, optimizer in enumerate(optimizers):
        parameters = _numbered(optimizer)
        prefix = flat_key(OPTIMIZER, str(number), "")
        for key in (key for key in saved if key.startswith(prefix)):
            index = int(key[len(prefix) :].split(".")[0])
            state[key] = _empty(saved[key], parameters[index])
    load_shards(state, folder)
    for number, optimizer in enumerate(optimizers):
        prefix = flat_key(OPTIMIZER, str(number), "")
        found: dict[int, dict[str, Tensor]] = {}
        for key in (key for key in saved if key.startswith(prefix)):
            parameter, name = key[len(prefix) :].split(".", 1)
            found.setdefault(int(parameter), {})[name] = state[key]
        optimizer.load_state_dict({**groups[number], "state": found})


def _numbered(optimizer: Optimizer) -> list[Tensor]:
    """Return the parameters in the order of ``state_dict``'s numbers."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def _empty(saved: Tensor, parameter: Tensor) -> Tensor:
    """Allocate a saved tensor: sharded like the parameter, or whole (a step count)."""
    if saved.shape == parameter.shape:
        return torch.empty_like(parameter, dtype=saved.dtype, requires_grad=False)
    return torch.empty_like(saved, device="cpu")
