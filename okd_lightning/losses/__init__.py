"""Losses: from hidden states and heads to numbers a token, tile by tile.

* ``quantities``: what a method may ask for (exact divergence, drawn-token log-prob, entropy, ...).
* ``closed_form``: their values with gradients written out.
* ``outcomes``, ``cached``: where a few ids and the rest are all that is known of the teacher.
* ``sampled``: policy gradient on drawn tokens, with its importance ratio.
* ``terms``: what a method hands to the module, and the records that go with it.
* ``side``, ``projection``: one model's half; its head forwards and backwards, tile by tile.
* ``tiling``: how many positions are handled at once.
* ``fused``: the training loss and its gradient from one pass over the tiles.
* ``reduction``: the one division by the optimizer step's normaliser.
* ``cpu_linear``: products with the head on CPUs, by oneDNN's kernels.
* ``exact``: the measured quantities themselves, for evaluation and for terms over whole sequences.
"""

from okd_lightning.losses.cached import (
    CachedAgreement,
    CachedDivergence,
    CachedDrawnOutcome,
    CachedExpectedWeight,
    cached_form,
)
from okd_lightning.losses.closed_form import ModelRole
from okd_lightning.losses.exact import measure
from okd_lightning.losses.fused import fused_loss
from okd_lightning.losses.outcomes import PackedHead, pack_outcomes
from okd_lightning.losses.quantities import (
    Agreement,
    DrawnLogProb,
    DrawnOutcome,
    Entropy,
    ExactDivergence,
    ExpectedWeight,
    Quantity,
    TeacherShift,
    Tile,
)
from okd_lightning.losses.sampled import ImportanceRatio
from okd_lightning.losses.side import Head, Side
from okd_lightning.losses.terms import (
    Measured,
    RowScorer,
    Term,
    WeightedLoss,
    WeightedTerm,
    weighted_loss,
)

__all__ = [
    "Agreement",
    "CachedAgreement",
    "CachedDivergence",
    "CachedDrawnOutcome",
    "CachedExpectedWeight",
    "DrawnLogProb",
    "DrawnOutcome",
    "Entropy",
    "ExactDivergence",
    "ExpectedWeight",
    "Head",
    "ImportanceRatio",
    "Measured",
    "ModelRole",
    "PackedHead",
    "Quantity",
    "RowScorer",
    "Side",
    "TeacherShift",
    "Term",
    "Tile",
    "WeightedLoss",
    "WeightedTerm",
    "cached_form",
    "fused_loss",
    "measure",
    "pack_outcomes",
    "weighted_loss",
]
