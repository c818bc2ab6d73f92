"""Test of whether a model computes packed rows independently, before training packs any."""

from __future__ import annotations

import torch
from lightning.pytorch.utilities import rank_zero_info
from peft import PeftModel
from transformers import PreTrainedModel

from okd_lightning.models.causal_lm import named_arguments
from okd_lightning.models.causality import attention_of_any_device, embedding_gradient
from okd_lightning.models.reading import hidden_of_pass, packed_states, say_row_groups
from okd_lightning.records.sequences import Sequences

_TRIAL_LENGTHS = (5, 4, 3, 2)
_TOLERANCE = 0.1
"""Allowed distance relative to the norm: above the rounding of deep models in 16 bits."""


def reads_packed_rows(model: PreTrainedModel) -> bool:
    """Return whether a model gives the same result for packed rows as for separate rows.

    Tested with four short rows in two packed ones, on the device of the weights. A row's result
    must not depend on the row packed before it (exactly, by the gradient), and must equal that of
    the row alone (within rounding, which tests the positions). A model on the meta device cannot be
    tested and does not pack.

    Args:
        model: Its weights and mode are not changed. Prompt learning never packs: it prepends its
            virtual tokens to the first row of a packed row only.
    """
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        return False
    device = next(model.parameters()).device
    if device.type == "meta":
        return False
    if "position_ids" not in named_arguments(model):
        return False
    read = _trial_rows(model).to(device)
    return not _leaks(model, read) and _is_same(model, read)


def packs_rows(model: PreTrainedModel, is_wanted: bool, role: str) -> bool:
    """Return whether a model of a run gets packed rows; log if it does not support them.

    Args:
        model: The student or the teacher.
        is_wanted: Whether the run packs.
        role: Its role, for the message.
    """
    packs = is_wanted and reads_packed_rows(model)
    if is_wanted and not packs:
        rank_zero_info(
            f"{role}: rows are padded, sorted by length, and not packed: {type(model).__name__} "
            "does not keep packed rows apart"
        )
    return packs


def _trial_rows(model: PreTrainedModel) -> Sequences:
    """Return rows of different ids with loss on all tokens."""
    lengths = torch.tensor(_TRIAL_LENGTHS)
    shape = len(lengths), int(lengths.max())
    num_ids = model.config.get_text_config().vocab_size
    ids = (torch.arange(shape[0] * shape[1]) * 7 % num_ids).reshape(shape)
    return Sequences(ids, lengths, torch.arange(shape[1]) < lengths[:, None])


def _leaks(model: PreTrainedModel, read: Sequences) -> bool:
    """Return whether the last row of a packed row depends on the other rows in it."""
    is_last = read.packing.row == read.packing.row.max(dim=1, keepdim=True).values
    packed = embedding_gradient(model, lambda: packed_states(model, read)[is_last])
    return bool((packed[~is_last] != 0).any())


def _is_same(model: PreTrainedModel, read: Sequences) -> bool:
    was_training = model.training
    model.eval()
    with torch.no_grad(), attention_of_any_device(model):
        alone, packed = (hidden_of_pass(model, read, packs).double() for packs in (False, True))
    model.train(was_training)
    return bool((packed - alone).norm() < _TOLERANCE * alone.norm())


def tried(model: PreTrainedModel, packing: bool) -> bool:
    """Test whether a teacher packs rows, and report slow fallbacks; return the result.

    Args:
        model: A model on its device, or on meta, where nothing can be tested yet.
        packing: Whether the run packs rows.
    """
    packs = packs_rows(model, packing, "teacher")
    say_row_groups(model, "teacher")
    return packs
