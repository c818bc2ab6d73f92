"""One model in memory as a teacher: its side of some rows, its rows' packing, its trained part."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from okd_lightning.losses import Side
from okd_lightning.models import LMHead, Vocabulary, hidden_at_loss, packs_rows, say_row_groups
from okd_lightning.records.sequences import Sequences


def model_side(
    model: PreTrainedModel, reads: Sequences, packs: bool, vocabulary: Vocabulary
) -> Side:
    """Return one model's hidden states at unmasked positions, with its head.

    Args:
        model: In the mode and with the gradients of the caller.
        reads: The rows.
        packs: Whether it gets packed rows.
        vocabulary: Ids to which the head is cut.
    """
    hidden = hidden_at_loss(model, reads, packs)
    head = LMHead.of(model, vocabulary)
    return Side(hidden, head, vocabulary.end_ids, vocabulary.size)


def tried(model: PreTrainedModel, packing: bool) -> bool:
    """Test how a teacher reads rows, and report slow fallbacks; return whether it packs them.

    Args:
        model: A model on its device, or on meta, where nothing can be tested yet.
        packing: Whether the run packs rows.
    """
    packs = packs_rows(model, packing, "teacher")
    say_row_groups(model, "teacher")
    return packs


def trained(model: nn.Module | None) -> list[nn.Parameter]:
    """Return a model's trained parameters; none without a model."""
    return [] if model is None else [p for p in model.parameters() if p.requires_grad]
