"""Filling of shards from weight files: every rank reads its own rows."""

from __future__ import annotations

import re
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from transformers import PreTrainedModel

from okd_lightning.errors import ModelError
from okd_lightning.models.deferred import deferred
from okd_lightning.models.weight_checks import (
    check_stored_formats,
    is_finite,
    is_ignored,
    not_finite,
    warn_unexpected,
)
from okd_lightning.models.weight_files import WeightFiles

_ADAPTED = re.compile(r"\.(base_layer|original_module|modules_to_save\.[^.]+)(?=\.)")
"""Parts that PEFT inserts between a layer's name and its weight's."""
_OUTDATED = (r"rotary_emb\.inv_freq", r"(^|\.)position_ids$")
"""Buffers that older checkpoints hold and that are computed now."""


@torch.no_grad()
def fill_from_files(model: nn.Module, device: torch.device) -> int:
    """Load every parameter that is on ``meta``, in place; others are not changed.

    Args:
        model: A sharded model built by ``causal_lm_without_weights``, with or without adapters.
        device: Device of the shards.

    Returns:
        Number of bytes that this rank has read.

    Raises:
        ModelError: A weight is not in the files under its name, is of another shape or not finite,
            or is stored in a format that no weight has.
    """
    about = deferred(model)
    if about is None:
        return 0
    where = f"{about.option} {about.source.given!r}"
    files = WeightFiles(about.source, about.option)
    check_stored_formats(cast(PreTrainedModel, model), files, where, about.learns)
    parameters, names = _parameters_on_meta(model)
    _check_tied(model, files, names, where)
    filled: dict[str, Tensor] = {}
    used: set[str] = set()
    broken, num_bytes = [], 0
    for own in names:
        old = parameters[own[0]]
        stored = [_stored(model, name) for name in own]
        candidates = [name for group in zip(*stored, strict=True) for name in group]
        used.update(candidates)
        data = _read(files, candidates, old, device)
        local = data.to_local() if isinstance(data, DTensor) else data
        num_bytes += local.nbytes
        if not is_finite(local):
            broken.append(own[0])
        filled.update(dict.fromkeys(own, nn.Parameter(data, requires_grad=old.requires_grad)))
    if broken := _of_all_ranks(broken):
        raise ModelError(not_finite(broken, where))
    for name, candidates in _stored_buffers(model, files).items():
        buffer = model.get_buffer(name)
        used.update(candidates)
        read = files.rows(candidates, 0, _num_rows(buffer), buffer.shape)
        filled[name] = read.to(buffer.device, buffer.dtype, copy=True)
    # assign: a parameter on meta has no memory to copy into
    model.load_state_dict(filled, strict=False, assign=True)
    _warn_unused(model, set(files.names) - used, where)
    return num_bytes


def _parameters_on_meta(model: nn.Module) -> tuple[dict[str, nn.Parameter], list[list[str]]]:
    """Return all parameters by name, and the names of each one on ``meta`` (several if tied)."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names: dict[int, list[str]] = {}
    for name, parameter in parameters.items():
        if parameter.is_meta:
            names.setdefault(id(parameter), []).append(name)
    return parameters, list(names.values())


def _check_tied(model: nn.Module, files: WeightFiles, names: list[list[str]], where: str) -> None:
    """Refuse files that hold two tables for a weight that the config ties.

    transformers, loading whole models, loads both; here they are one parameter already.
    """
    for own in names:
        stored = {files.stored_under(_stored(model, name)) for name in own} - {None}
        first, *others = sorted(cast("set[str]", stored)) or [""]
        for other in others:
            if not torch.equal(files.whole(first), files.whole(other)):
                raise ModelError(
                    f"{where}: config.json ties {first} and {other}, and the files hold other "
                    "numbers for each; set tie_word_embeddings to false in config.json"
                )


def _stored_buffers(model: nn.Module, files: WeightFiles) -> dict[str, list[str]]:
    """Return buffers of a model's state (DeepSeek's routing bias), with their stored names."""
    state = model.state_dict()  # without buffers that are computed from the config
    ignored = getattr(model, "_keys_to_ignore_on_load_missing", None)
    found = {}
    for name, _ in model.named_buffers():
        candidates = _stored(model, name)
        is_there = files.stored_under(candidates) is not None
        if name in state and (is_there or not is_ignored(name, ignored)):
            found[name] = candidates
    return found


def _warn_unused(model: nn.Module, names: set[str], where: str) -> None:
    """Warn of unused weights as transformers does; the class's own patterns excuse names too."""
    ignored = (*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()), *_OUTDATED)
    unused = [name for name in names if not is_ignored(name, ignored)]
    if unused and _is_first_rank():
        warn_unexpected(unused, where)


def _is_first_rank() -> bool:
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def _of_all_ranks(names: list[str]) -> list[str]:
    """Return the names that any rank has found: all ranks then raise, and none waits."""
    if not torch.distributed.is_initialized():
        return names
    found: list[list[str]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(found, names)
    return sorted({name for part in found for name in part})


def _num_rows(value: Tensor) -> int:
    return value.shape[0] if value.dim() else 0


def _read(files: WeightFiles, names: list[str], old: Tensor, device: torch.device) -> Tensor:
    """Return this rank's rows of a weight that has one of ``names``, in ``old``'s number format."""
    if not isinstance(old, DTensor):
        return files.rows(names, 0, _num_rows(old), old.shape).to(device, old.dtype, copy=True)
    (placement,) = old.placements
    assert placement == Shard(0)
    mesh, num_rows = old.device_mesh, old.shape[0]
    # FSDP2's rule for uneven shards: rounded-up rows per rank, fewer on the last ones
    size = -(-num_rows // mesh.size())
    start = min(mesh.get_local_rank() * size, num_rows)
    end = min(start + size, num_rows)
    part = files.rows(names, start, end, old.shape)
    part = part.to(device, old.dtype, copy=True)  # a copy instead of the file's memory map
    return DTensor.from_local(
        part, mesh, old.placements, run_check=False, shape=old.shape, stride=old.stride()
    )


def _stored(model: nn.Module, name: str) -> list[str]:
    """Return a parameter's possible names in the files, with and without the base's prefix."""
    plain = _ADAPTED.sub("", name)
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    return [plain, plain.removeprefix(prefix)]
