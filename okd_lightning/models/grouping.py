"""Measurement of which rows may share a forward pass without changing each other's results.

Some rotary embeddings choose their frequencies by the longest row of a batch. ``longrope`` (Phi-3)
has one set up to a length and one above it. ``dynamic`` has a different set for each length above
it, and keeps the last one until a short row is read. Rows are then grouped by side, or by length.
The behaviour is measured on the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from okd_lightning.errors import ModelError
from okd_lightning.models.causal_lm import head_inputs
from okd_lightning.models.causality import attention_of_any_device, own_precision

_MARGIN = 8.0
"""Smallest change that counts, in multiples of the change by rounding alone."""


def forget_lengths(model: PreTrainedModel) -> None:
    """Run the model over one token, which resets its remembered length."""
    ids = torch.zeros(1, 1, dtype=torch.int64, device=next(model.parameters()).device)
    with torch.no_grad():
        head_inputs(model, ids, torch.ones_like(ids))


def switches(config: PretrainedConfig) -> list[int]:
    """Return the lengths in a config at which a scaled rotary embedding may change."""
    text = config.get_text_config()
    scaled = [p for p in _rope_parameters(text) if p.get("rope_type", "default") != "default"]
    if not scaled:
        return []
    name = "original_max_position_embeddings"
    found = [p.get(name) for p in scaled]
    found += [getattr(text, name, None), getattr(text, "max_position_embeddings", None)]
    return sorted({int(length) for length in found if length})


def _rope_parameters(config: PretrainedConfig) -> Iterator[Mapping[str, Any]]:
    """Yield the config's rope parameters: one mapping, or one for each type of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    if "rope_type" in parameters:
        yield parameters
    else:
        yield from (p for p in parameters.values() if isinstance(p, Mapping))


def measured_groups(model: PreTrainedModel) -> tuple[int | None, bool]:
    """Measure short rows together with rows on either side of each length in the config.

    Returns:
        The length above which rows are read apart, None for none; and whether each length then
        needs a pass of its own.

    Raises:
        ModelError: A row's result depends on rows of earlier passes.
    """
    lengths = switches(model.config)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), attention_of_any_device(model), own_precision(model):
            is_other, first = _compared(model, lengths[0], beside=2 * lengths[-1] + 1)
            if not is_other:
                return None, False
            found = [s for s in lengths if _differs(model, s, beside=s + 1)]
            found = found or [_searched(model, lengths[0], 2 * lengths[-1] + 1)]
            by_length = len(found) > 1 or _differs(model, found[0] + 2, beside=2 * found[0] + 3)
            forget_lengths(model)
            again = _read(model, lengths[0], lengths[0])
    finally:
        model.train(was_training)
    if (again - first).norm() > 1e-3 * first.norm():
        raise ModelError(
            f"{type(model).__name__}: its result for a row depends on the rows of earlier passes; "
            "leave its scaled rotary embedding out (rope_parameters in its config), "
            "or use another model"
        )
    return found[0], by_length


def _searched(model: PreTrainedModel, same: int, other: int) -> int:
    """Find by bisection the longest row that does not change a row of ``same`` tokens."""
    own = same
    while other - same > 1:
        middle = (same + other) // 2
        same, other = (same, middle) if _differs(model, own, middle) else (middle, other)
    return same


def _differs(model: PreTrainedModel, own: int, beside: int) -> bool:
    forget_lengths(model)
    return _compared(model, own, beside)[0]


def _compared(model: PreTrainedModel, own: int, beside: int) -> tuple[bool, Tensor]:
    """Return whether a row of ``own`` tokens changes in a pass with a longer row, and its result
    in a pass with a row of its own length.
    """
    truth = _read(model, own, own)
    rounding = _read(model, own, own - 1) - truth  # 0 but for mixtures of experts
    change = _read(model, own, beside) - truth  # last: some models remember the longest row
    return bool(change.norm() > _MARGIN * rounding.norm()), truth


def _read(model: PreTrainedModel, own: int, beside: int) -> Tensor:
    """Return [positions, hidden] of the first of two rows of given lengths in one pass; each is
    represented by four tokens, because only the positions matter.
    """
    device = next(model.parameters()).device
    positions = torch.stack([_spread(own), _spread(beside)]).to(device)
    ids = torch.arange(positions.numel(), device=device).reshape(positions.shape)
    ids = ids % model.config.get_text_config().vocab_size
    return head_inputs(model, ids, torch.ones_like(ids), positions)[0].double()


def _spread(length: int) -> Tensor:
    """Return the positions of four tokens, spread over a row of ``length``."""
    return torch.tensor([0, length // 3, 2 * length // 3, length - 1])
