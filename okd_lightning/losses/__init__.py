"""Losses: from hidden states and heads to numbers a token, tile by tile.

* ``quantities``: what a method may ask for (exact divergence, drawn-token log-prob, entropy, ...).
* ``exact``: runs the heads over tiles of masked-in positions and measures what was asked for.
* ``sampled``: policy gradient on drawn tokens, with its importance ratio.
* ``terms``: what a method hands to the module, and the record that it gets back.
"""

from okd_lightning.losses.exact import Side, measure
from okd_lightning.losses.quantities import (
    Agreement,
    DrawnLogProb,
    DrawnOutcome,
    Entropy,
    ExactDivergence,
    ExpectedWeight,
    ModelRole,
    Quantity,
    TeacherShift,
    Tile,
)
from okd_lightning.losses.sampled import ImportanceRatio
from okd_lightning.losses.terms import Measured, RowScorer, Term

__all__ = [
    "Agreement",
    "DrawnLogProb",
    "DrawnOutcome",
    "Entropy",
    "ExactDivergence",
    "ExpectedWeight",
    "ImportanceRatio",
    "Measured",
    "ModelRole",
    "Quantity",
    "RowScorer",
    "Side",
    "TeacherShift",
    "Term",
    "Tile",
    "measure",
]
