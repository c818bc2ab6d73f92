"""Rows that may share a forward pass: a row's result must not depend on the other rows.

Some rotary embeddings choose their frequencies by the longest row of a batch. ``longrope`` (Phi-3)
has one set up to a length and one above it. ``dynamic`` has a different set for each length above
it, and keeps the last one until a short row is read. Rows are then grouped by side, or by length.
The behaviour is measured on the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from peft import PeftModel
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from okd_lightning.errors import ModelError
from okd_lightning.models.causal_lm import head_inputs, named_arguments
from okd_lightning.models.causality import attention_of_any_device, own_precision

_MARGIN = 8.0
"""Smallest change that counts, in multiples of the change by rounding alone."""


@dataclass(frozen=True)
class RowGroups:
    """Groups of rows that a model may read in one pass.

    Attributes:
        switch: Rows of more tokens are read separately from the others; None if any rows may share
            a pass.
        by_length: Rows above the switch share a pass only with rows of the same length, and follow
            a short row, which resets the model's remembered length.
        virtual_tokens: Tokens that prompt learning prepends to a row (it does not always).
    """

    switch: int | None = None
    by_length: bool = False
    virtual_tokens: int = 0

    def group(self, length: int) -> int:
        """Return a number that is equal for rows that may share a pass; grows with the length."""
        if self.switch is None or length + self.virtual_tokens <= self.switch:
            return 0
        return length if self.by_length else 1 + (length > self.switch)

    def split(self, lengths: Sequence[int]) -> list[list[int]]:
        """Return the row numbers of each pass, short rows first."""
        groups: dict[int, list[int]] = {}
        for number, length in enumerate(lengths):
            groups.setdefault(self.group(length), []).append(number)
        return [groups[key] for key in sorted(groups)]

    def follows_a_short_row(self, length: int) -> bool:
        """Return whether a first pass of rows up to ``length`` tokens needs a short row before."""
        if self.switch is None or not self.by_length:
            return False
        return length + self.virtual_tokens >= self.switch


ANY_ROWS = RowGroups()


def row_groups(model: PreTrainedModel) -> RowGroups:
    """Return the rows that ``model`` may read in one pass; measured once and kept on the model.

    Skipped for a config without a scaled rotary embedding. On the meta device it is postponed
    until the weights are loaded.

    Args:
        model: A causal LM, wrapped or not; its weights and mode are not changed.

    Raises:
        ModelError: A row's result depends on rows of earlier passes.
    """
    if isinstance(model, PeftModel):
        own = row_groups(model.get_base_model())
        virtual = getattr(model.active_peft_config, "num_virtual_tokens", None)
        return replace(own, virtual_tokens=virtual or 0)
    known: RowGroups | None = getattr(model, "_okd_row_groups", None)
    if known is None:
        if not _switches(model.config) or "position_ids" not in named_arguments(model):
            known = ANY_ROWS
        elif next(model.parameters()).device.type == "meta":
            return ANY_ROWS
        else:
            known = _tried(model)
        object.__setattr__(model, "_okd_row_groups", known)
    return known


def say_row_groups(model: PreTrainedModel, role: str) -> None:
    """Log if rows must be read in groups.

    Args:
        model: The student or the teacher.
        role: Its role, for the message.
    """
    groups = row_groups(model)
    if groups.switch is not None:
        apart = "by length" if groups.by_length else "apart"
        rank_zero_info(
            f"{role}: rows of more than {groups.switch} tokens are read {apart}, because the "
            f"rotary embedding of {type(model).__name__} depends on the longest row of a pass"
        )


def forget_lengths(model: PreTrainedModel) -> None:
    """Run the model over one token, which resets its remembered length."""
    ids = torch.zeros(1, 1, dtype=torch.int64, device=next(model.parameters()).device)
    with torch.no_grad():
        head_inputs(model, ids, torch.ones_like(ids))


def _switches(config: PretrainedConfig) -> list[int]:
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


def _tried(model: PreTrainedModel) -> RowGroups:
    """Measure short rows together with rows on either side of each length in the config."""
    switches = _switches(model.config)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), attention_of_any_device(model), own_precision(model):
            is_other, first = _compared(model, switches[0], beside=2 * switches[-1] + 1)
            if not is_other:
                return ANY_ROWS
            found = [s for s in switches if _differs(model, s, beside=s + 1)]
            found = found or [_searched(model, switches[0], 2 * switches[-1] + 1)]
            by_length = len(found) > 1 or _differs(model, found[0] + 2, beside=2 * found[0] + 3)
            forget_lengths(model)
            again = _read(model, switches[0], switches[0])
    finally:
        model.train(was_training)
    if (again - first).norm() > 1e-3 * first.norm():
        raise ModelError(
            f"{type(model).__name__}: what it computes for a row depends on the rows that it has "
            "read before; leave its scaled rotary embedding out (rope_parameters in its config), "
            "or use another model"
        )
    return RowGroups(found[0], by_length)


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
