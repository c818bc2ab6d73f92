"""Callbacks that a DistillationModule adds to every Trainer (``configure_callbacks``).

* ``finite_guard``: ``FiniteGuard`` stops before a step with a non-finite loss or gradient.
* ``health_warnings``: ``HealthWarnings``, with its thresholds in ``vital_signs``.
* ``step_intervals``: ``StepIntervals`` counts ``val_check_interval`` in optimizer steps.
* ``models_first``: ``ModelsFirst`` builds both models before other callbacks' ``setup``.
* ``idle_options``: the warning about options that have no effect in a run.
"""

from okd_lightning.training.safeguards.finite_guard import FiniteGuard
from okd_lightning.training.safeguards.health_warnings import HealthWarnings
from okd_lightning.training.safeguards.models_first import ModelsFirst, in_setup_order
from okd_lightning.training.safeguards.step_intervals import StepIntervals

SAFEGUARDS = (FiniteGuard, HealthWarnings, StepIntervals)
"""Added where a Trainer has no callback of the class."""

__all__ = [
    "SAFEGUARDS",
    "FiniteGuard",
    "HealthWarnings",
    "ModelsFirst",
    "StepIntervals",
    "in_setup_order",
]
