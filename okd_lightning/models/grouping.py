"""Rows that may share a forward pass: what a model computes for a row must not depend on others.

Some rotary embeddings choose their frequencies by the longest row of a batch: ``longrope`` (Phi-3)
has one set for each side of a length, ``dynamic`` has another one for each length beyond it, and
keeps the last one until a short row comes. Such rows are read beside rows of their own side, or of
their own length. Which of them it is, if any, is tried on the model.
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
from okd_lightning.models.causal_lm import head_inputs
from okd_lightning.models.causality import attention_of_any_device, own_precision
from okd_lightning.models.forward_arguments import named_arguments

_MARGIN = 8.0
"""A change counts from this many times the change that rounding alone makes on."""


@dataclass(frozen=True)
class RowGroups:
    """Which rows a model may read in one pass.

    Attributes:
        switch: Rows of more tokens are read apart from the others; None where any rows may share a
            pass.
        by_length: Rows beyond the switch are read beside rows of their own length alone, and after
            a short row, which makes the model forget the length before.
        virtual_tokens: In front of each row where prompt learning acts, which it does not always.
    """

    switch: int | None = None
    by_length: bool = False
    virtual_tokens: int = 0

    def group(self, length: int) -> int:
        """Equal for rows that may share a pass; grows with the length."""
        if self.switch is None or length + self.virtual_tokens <= self.switch:
            return 0
        return length if self.by_length else 1 + (length > self.switch)

    def split(self, lengths: Sequence[int]) -> list[list[int]]:
        """Numbers of the rows of each pass, short rows first."""
        groups: dict[int, list[int]] = {}
        for number, length in enumerate(lengths):
            groups.setdefault(self.group(length), []).append(number)
        return [groups[key] for key in sorted(groups)]

    def follows_a_short_row(self, length: int) -> bool:
        """Whether a first pass over rows of up to ``length`` tokens has to be preceded by one."""
        if self.switch is None or not self.by_length:
            return False
        return length + self.virtual_tokens >= self.switch


ANY_ROWS = RowGroups()


def row_groups(model: PreTrainedModel) -> RowGroups:
    """Which rows ``model`` may read in one pass; tried once and kept with the model.

    Nothing is tried where the config names no scaled rotary embedding. On the meta device nothing
    can be tried: it is when the weights are there.

    Args:
        model: A causal LM, wrapped or not; its weights and mode stay as they are.

    Raises:
        ModelError: What it computes for a row depends on the rows before it.
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
    """Say it where rows cannot be read as they come.

    Args:
        model: The student or the teacher.
        role: Which of the two, for the message.
    """
    groups = row_groups(model)
    if groups.switch is not None:
        apart = "by length" if groups.by_length else "apart"
        rank_zero_info(
            f"{role}: rows of more than {groups.switch} tokens are read {apart}, because the "
            f"rotary embedding of {type(model).__name__} depends on the longest row of a pass"
        )


def forget_lengths(model: PreTrainedModel) -> None:
    """Read one token, after which a model computes every row as if it were its first."""
    ids = torch.zeros(1, 1, dtype=torch.int64, device=next(model.parameters()).device)
    with torch.no_grad():
        head_inputs(model, ids, torch.ones_like(ids))


def _switches(config: PretrainedConfig) -> list[int]:
    """Lengths in a config at which a scaled rotary embedding may change its frequencies."""
    text = config.get_text_config()
    scaled = [p for p in _rope_parameters(text) if p.get("rope_type", "default") != "default"]
    if not scaled:
        return []
    name = "original_max_position_embeddings"
    found = [p.get(name) for p in scaled]
    found += [getattr(text, name, None), getattr(text, "max_position_embeddings", None)]
    return sorted({int(length) for length in found if length})


def _rope_parameters(config: PretrainedConfig) -> Iterator[Mapping[str, Any]]:
    """One mapping, or one for each type of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    if "rope_type" in parameters:
        yield parameters
    else:
        yield from (p for p in parameters.values() if isinstance(p, Mapping))


def _tried(model: PreTrainedModel) -> RowGroups:
    """Read short rows beside rows on either side of each length that the config names."""
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
    """The longest row beside which one of ``same`` tokens is what it is alone, by bisection."""
    own = same
    while other - same > 1:
        middle = (same + other) // 2
        same, other = (same, middle) if _differs(model, own, middle) else (middle, other)
    return same


def _differs(model: PreTrainedModel, own: int, beside: int) -> bool:
    forget_lengths(model)
    return _compared(model, own, beside)[0]


def _compared(model: PreTrainedModel, own: int, beside: int) -> tuple[bool, Tensor]:
    """Whether a row of ``own`` tokens is another one beside a row of ``beside`` tokens; and the row
    as it is beside one of its own length.
    """
    truth = _read(model, own, own)
    rounding = _read(model, own, own - 1) - truth  # 0 but for mixtures of experts
    change = _read(model, own, beside) - truth  # last: some models remember the longest row
    return bool(change.norm() > _MARGIN * rounding.norm()), truth


def _read(model: PreTrainedModel, own: int, beside: int) -> Tensor:
    """[positions, hidden] of a row of ``own`` tokens beside one of ``beside``; both are sketched by
    four tokens, because the positions alone matter.
    """
    device = next(model.parameters()).device
    positions = torch.stack([_spread(own), _spread(beside)]).to(device)
    ids = torch.arange(positions.numel(), device=device).reshape(positions.shape)
    ids = ids % model.config.get_text_config().vocab_size
    return head_inputs(model, ids, torch.ones_like(ids), positions)[0].double()


def _spread(length: int) -> Tensor:
    """Positions of four tokens of a row of ``length``, so that frequencies show."""
    return torch.tensor([0, length // 3, 2 * length // 3, length - 1])
