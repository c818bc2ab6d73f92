"""One model's side of a batch: a forward pass, its hidden states and what is taken besides."""

from __future__ import annotations

from transformers import PreTrainedModel

from okd_lightning.losses import Side
from okd_lightning.models import LMHead, Vocabulary, hidden_at_loss
from okd_lightning.models.taps import Taps
from okd_lightning.records.sequences import Sequences


def model_side(
    model: PreTrainedModel,
    reads: Sequences,
    packs: bool,
    vocabulary: Vocabulary,
    layers: tuple[int, ...] = (),
    reads_routers: bool = False,
) -> Side:
    """Return one model's hidden states at unmasked positions, with its head.

    Args:
        model: In the mode and with the gradients of the caller.
        reads: The rows.
        packs: Whether it gets packed rows.
        vocabulary: Ids to which the head is cut.
        layers: Layers whose states are returned too.
        reads_routers: Whether the routers' outputs are returned too.
    """
    taps = None
    if layers or reads_routers:
        taps = Taps(model, len(reads.lengths), layers, reads_routers)
    hidden = hidden_at_loss(model, reads, packs, taps)
    states = None if taps is None else taps.states()
    head = LMHead.of(model, vocabulary)
    return Side(hidden=hidden, head=head, end_ids=vocabulary.end_ids, states=states)
