"""Losses: per-token quantities from hidden states and heads, computed in tiles of positions.

* ``quantities``: what a method can measure (exact divergence, sampled-token log-prob, entropy).
* ``closed_form``: their values with closed-form gradients.
* ``outcomes``, ``cached``: quantities of a teacher known by k ids and the rest.
* ``sampled``: policy gradient on sampled tokens, with its importance ratio.
* ``states``: quantities of hidden states and routers, which need no logits.
* ``terms``: the interface between method and module, and its records.
* ``mixtures``: several models' hidden states and heads as one side.
* ``projection``: one model's hidden states and head; its logits and their gradient, by tiles.
* ``fused``: the training loss and its gradient from one pass over the tiles.
* ``reduction``: the division by the optimizer step's divisor.
* ``cpu_linear``: products with the head on CPUs, by oneDNN's kernels.
* ``chunked``: losses of a teacher with another tokenizer, over chunks of text.
* ``exact``: quantities at all positions, for evaluation and for terms over whole sequences.
"""

from okd_lightning.losses.cached import (
    CachedAgreement,
    CachedDivergence,
    CachedDrawnOutcome,
    CachedExpectedWeight,
    cached_form,
)
from okd_lightning.losses.chunked import (
    ChunkValues,
    chunked_loss,
    measure_chunks,
    token_values,
)
from okd_lightning.losses.closed_form import ModelRole
from okd_lightning.losses.exact import measure
from okd_lightning.losses.fused import fused_loss
from okd_lightning.losses.mixtures import Mixing, Mixture, Product, mixed_side, routed_side
from okd_lightning.losses.outcomes import PackedHead, pack_outcomes
from okd_lightning.losses.projection import Head, Side
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
from okd_lightning.losses.states import (
    HiddenDistance,
    RouterBalance,
    StateQuantity,
)
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
    "ChunkValues",
    "DrawnLogProb",
    "DrawnOutcome",
    "Entropy",
    "ExactDivergence",
    "ExpectedWeight",
    "Head",
    "HiddenDistance",
    "ImportanceRatio",
    "Measured",
    "Mixing",
    "Mixture",
    "ModelRole",
    "PackedHead",
    "Product",
    "Quantity",
    "RouterBalance",
    "RowScorer",
    "Side",
    "StateQuantity",
    "TeacherShift",
    "Term",
    "Tile",
    "WeightedLoss",
    "WeightedTerm",
    "cached_form",
    "chunked_loss",
    "fused_loss",
    "measure",
    "measure_chunks",
    "mixed_side",
    "pack_outcomes",
    "routed_side",
    "token_values",
    "weighted_loss",
]
