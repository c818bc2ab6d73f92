"""Losses: from hidden states and heads to numbers a token, tile by tile.

* ``quantities``: what a method may ask for (exact divergence, drawn-token log-prob, entropy, ...).
* ``exact``: runs the heads over tiles of masked-in positions and measures what was asked for.
* ``terms``: what a method hands to the module, and the record that it gets back.
"""

from okd_lightning.losses.exact import Side, measure
from okd_lightning.losses.quantities import (
    Agreement,
    DrawnLogProb,
    Entropy,
    ExactDivergence,
    ModelRole,
    Quantity,
    TeacherShift,
    Tile,
)
from okd_lightning.losses.terms import Measured, Term

__all__ = [
    "Agreement",
    "DrawnLogProb",
    "Entropy",
    "ExactDivergence",
    "Measured",
    "ModelRole",
    "Quantity",
    "Side",
    "TeacherShift",
    "Term",
    "Tile",
    "measure",
]
