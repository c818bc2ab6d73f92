"""Filling the shards of a model whose weights were left on disk: every rank reads its own rows."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from okd_lightning.models.deferred import WeightFiles, weight_files

_ADAPTED = re.compile(r"\.(base_layer|original_module|modules_to_save\.[^.]+)(?=\.)")
"""What PEFT puts between a layer's name and its weight's."""


@torch.no_grad()
def fill_from_files(model: nn.Module, device: torch.device) -> int:
    """Give every parameter that is on ``meta`` its data, in place; others stay as they are.

    Args:
        model: In shards, as ``causal_lm_without_weights`` built it, with adapters or without.
        device: Where the shards go.

    Returns:
        Bytes that this rank has read.

    Raises:
        ModelError: A weight is not in the files under its name.
    """
    files = weight_files(model)
    if files is None:
        return 0
    names: dict[int, list[str]] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in parameters.items():
        if parameter.is_meta:
            names.setdefault(id(parameter), []).append(name)
    filled, num_bytes = {}, 0
    for own in names.values():
        old = parameters[own[0]]
        data = _read(files, [_stored(model, name) for name in own], old, device)
        num_bytes += data.to_local().nbytes if isinstance(data, DTensor) else data.nbytes
        new = nn.Parameter(data, requires_grad=old.requires_grad)
        filled.update(dict.fromkeys(own, new))
    model.load_state_dict(filled, strict=False, assign=True)
    return num_bytes


def _read(files: WeightFiles, names: list[list[str]], old: Tensor, device: torch.device) -> Tensor:
    """This rank's rows of a weight that has one of ``names``, in ``old``'s number format."""
    candidates = [name for group in zip(*names, strict=True) for name in group]
    if not isinstance(old, DTensor):
        return files.rows(candidates, 0, old.shape[0]).to(device, old.dtype, copy=True)
    (placement,) = old.placements
    assert placement == Shard(0)
    mesh, num_rows = old.device_mesh, old.shape[0]
    size = -(-num_rows // mesh.size())
    start = min(mesh.get_local_rank() * size, num_rows)
    end = min(start + size, num_rows)
    part = files.rows(candidates, start, end).to(device, old.dtype, copy=True)  # not the file's map
    return DTensor.from_local(
        part, mesh, old.placements, run_check=False, shape=old.shape, stride=old.stride()
    )


def _stored(model: nn.Module, name: str) -> list[str]:
    """What a parameter may be called in the files: its name, or its name without the head's."""
    plain = _ADAPTED.sub("", name)
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    return [plain, plain.removeprefix(prefix)]
