"""Shrinking: a student that is a part of its teacher, chosen by measurements.

* ``layers``: the decoder layers of a model, and passes that skip some of them.
* ``calibration``: the loss on some rows, and the distance from the teacher.
* ``depth``: the layers that are dropped, by the least loss of distillation.
* ``sizes``: which axes of which weights depend on a size of the config, measured.
* ``scores``: importance of neurons, heads and channels.
* ``selection``: the units that are kept; passes without the others.
* ``widths``: the neurons, heads and channels that stay.
* ``norms``: scales that depend on the number of channels.
* ``cutting``: the student, checked against the teacher without the dropped parts.
"""

from okd_lightning.models.shrinking.calibration import Calibration, Loss
from okd_lightning.models.shrinking.cutting import cut_model
from okd_lightning.models.shrinking.depth import DepthCandidate, choose_layers, without
from okd_lightning.models.shrinking.layers import DecoderLayers
from okd_lightning.models.shrinking.widths import WidthCut, Widths, choose_widths, wanted_sizes

__all__ = [
    "Calibration",
    "DecoderLayers",
    "DepthCandidate",
    "Loss",
    "WidthCut",
    "Widths",
    "choose_layers",
    "choose_widths",
    "cut_model",
    "wanted_sizes",
    "without",
]
