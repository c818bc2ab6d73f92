"""Kind of cache that a model supports during generation, measured on the model.

Three kinds, fastest first: keys and values by position, whose rows leave and join; the model's own
kind of cache, for rows of one length; none, with a pass over the whole row for every token. A model
may accept a cache and not continue from it, or have no argument for one, so each kind is tested
against whole passes before it is used.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import DynamicCache, PreTrainedModel

from okd_lightning.engines.kv_cache import CachedModel, empty_cache, is_rearrangeable, rearrange
from okd_lightning.models.causal_lm import last_logits
from okd_lightning.models.causality import attention_of_any_device, own_precision

Memory: TypeAlias = Literal["rows", "batch", "none"]

MEMORIES: tuple[Memory, ...] = ("rows", "batch", "none")
"""Fastest first."""

_FAULTS = (
    TypeError,
    ValueError,
    AttributeError,
    KeyError,
    IndexError,
    NotImplementedError,
    RuntimeError,
)
"""Errors of models that get a cache of another kind than their own."""

_TOLERANCE: dict[torch.dtype | None, float] = {torch.float64: 1e-3, torch.float32: 1e-2}
_ROUNDED = 0.2
"""Allowed median distance relative to the norm in 16 bits: rounding also changes chosen experts."""

_PROMPTS = ((0, 2, 3, 4, 5, 6), (1, 2, 3, 4, 5, 6), (5, 3), (4, 1, 2, 6))
"""Test prompts: the first two differ in their first token only; the others are shorter; the last
joins later."""

_STEPS = (7, 3)


def memory_of(model: PreTrainedModel) -> Memory:
    """Return the fastest kind with the results of whole passes; measured once and kept.

    On the meta device it cannot be measured, and whole passes are used.

    Args:
        model: A causal LM, not wrapped; its weights and mode are not changed.
    """
    known: Memory | None = getattr(model, "_okd_memory", None)
    if known is None:
        if next(model.parameters()).device.type == "meta":
            return "none"
        known = _tried(model)
        object.__setattr__(model, "_okd_memory", known)
        if known == "none":
            rank_zero_info(
                f"{type(model).__name__} does not continue from the cache that it is given: every "
                "generated token takes a pass over its whole row, which is slow for long rows"
            )
    return known


def whole_logits(model: PreTrainedModel, rows: list[tuple[int, ...]]) -> Tensor:
    """Return [rows, table] logits for the token after each row, from one pass without a cache.

    Args:
        model: A causal LM, not wrapped.
        rows: Ids, ragged; rows that may share a pass.
    """
    device = next(model.parameters()).device
    width = max(map(len, rows))
    ids = torch.tensor([row + (0,) * (width - len(row)) for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    mask = torch.arange(width, device=device) < lengths[:, None]
    wanted = {"attention_mask": mask, "use_cache": False}
    return last_logits(model, {"input_ids": ids}, wanted, lengths - 1)


def _tried(model: PreTrainedModel) -> Memory:
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), attention_of_any_device(model), own_precision(model):
            if is_rearrangeable(model) and _holds(model, "rows"):
                return "rows"
            return "batch" if _holds(model, "batch") else "none"
    finally:
        model.train(was_training)


def _holds(model: PreTrainedModel, memory: Memory) -> bool:
    """Return whether steps from the cache equal whole passes, for rows with different starts."""
    if not CachedModel(model).has_cache:
        return False
    config = model.config.get_text_config()
    known = [i for i in range(config.vocab_size) if i != getattr(config, "pad_token_id", None)]
    prompts = [tuple(known[i % len(known)] for i in ids) for ids in _PROMPTS]
    steps = [known[i % len(known)] for i in _STEPS]
    try:
        found, rows = (_with_rows if memory == "rows" else _with_batch)(model, prompts, steps)
    except _FAULTS:
        return False
    truth = whole_logits(model, rows).double()
    found, truth = (x - x.mean(-1, keepdim=True) for x in (found.double(), truth))
    distances = (found - truth).norm(dim=-1) / truth.norm(dim=-1).clamp(min=1e-30)
    ignores_context = bool((found[0] == found[1]).all() and (truth[0] != truth[1]).any())
    tolerance = _TOLERANCE.get(next(model.parameters()).dtype)
    if tolerance is None or isinstance(model, FSDPModule):  # FSDP may compute in 16 bits
        return bool(distances.median() < _ROUNDED) and not ignores_context
    return bool(distances.max() < tolerance) and not ignores_context


def _with_rows(
    model: PreTrainedModel, prompts: list[tuple[int, ...]], steps: list[int]
) -> tuple[Tensor, list[tuple[int, ...]]]:
    """Return logits after steps of rows that leave, are reordered and join; and their ids."""
    first, second, short, later = prompts
    cache, joining = empty_cache(model, True), empty_cache(model, True)
    starts = [0, 0, len(first) - len(short)]
    width = len(first)
    _read_rows(model, [first, second, short], starts, 0, cache)
    one = _read_rows(model, [(steps[0],)] * 3, starts, width, cache)
    _read_rows(model, [later], [0], 0, joining)
    device = next(model.parameters()).device
    keep, own = torch.tensor([2, 1], device=device), torch.tensor([0], device=device)
    rearrange(cache, keep, 0, [(joining, own)])
    starts = [starts[2], starts[1], width + 1 - len(later)]
    two = _read_rows(model, [(steps[1],)] * 3, starts, width + 1, cache)
    _check_grown(cache, width + 2)
    read = [(*row, steps[0]) for row in (first, second, short)]
    read += [(*row, steps[1]) for row in (read[2], read[1], later)]
    return torch.cat([one, two]), read


def _read_rows(
    model: PreTrainedModel,
    rows: list[tuple[int, ...]],
    starts: list[int],
    column: int,
    cache: DynamicCache,
) -> Tensor:
    """Append rows, padded on the left, starting at a column of the cache."""
    device = next(model.parameters()).device
    num_tokens = max(map(len, rows))
    ids = torch.tensor([(0,) * (num_tokens - len(row)) + row for row in rows], device=device)
    columns = torch.arange(column + num_tokens, device=device)
    first = torch.tensor(starts, device=device)[:, None]
    positions = (columns[column:] - first).clamp(min=0)
    return CachedModel(model).logits(ids, positions, (columns >= first).long(), cache)


def _with_batch(
    model: PreTrainedModel, prompts: list[tuple[int, ...]], steps: list[int]
) -> tuple[Tensor, list[tuple[int, ...]]]:
    """Return logits after steps of two rows of one length; and their ids."""
    rows, cache, reader = prompts[:2], empty_cache(model, False), CachedModel(model)
    device = next(model.parameters()).device
    found: list[Tensor] = []
    read: list[tuple[int, ...]] = []
    for column, new in enumerate([rows, *([(step,)] * 2 for step in steps)]):
        ids = torch.tensor(new, device=device)
        first = 0 if column == 0 else len(prompts[0]) + column - 1
        positions = (torch.arange(ids.shape[1], device=device) + first).expand_as(ids)
        logits = reader.logits(ids, positions, None, cache)
        if column:
            rows = [(*row, steps[column - 1]) for row in rows]
            found.append(logits)
            read += rows
    return torch.cat(found), read


def _check_grown(cache: DynamicCache, num_columns: int) -> None:
    if cache.get_seq_length() != num_columns:
        raise ValueError(f"the cache holds {cache.get_seq_length()} columns of {num_columns}")
