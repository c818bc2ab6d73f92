"""Callbacks that a DistillationModule adds to every Trainer (``configure_callbacks``).

* ``FiniteGuard`` (``training.step``) stops before a step with a non-finite loss or gradient.
* ``health_warnings``: ``HealthWarnings`` warns about failing runs.
* ``step_intervals``: ``StepIntervals`` counts ``val_check_interval`` in optimizer steps.
* ``models_first``: ``ModelsFirst`` builds both models before other callbacks' ``setup``.
* ``idle_options``: the warning about options that have no effect in a run.
"""

import lightning
from lightning.pytorch.callbacks import Callback

from okd_lightning.training.safeguards.health_warnings import HealthWarnings
from okd_lightning.training.safeguards.models_first import (
    ModelsFirst,
    in_setup_order,
    with_batch_check,
)
from okd_lightning.training.safeguards.step_intervals import StepIntervals
from okd_lightning.training.step import FiniteGuard

SAFEGUARDS = (FiniteGuard, HealthWarnings, StepIntervals)
"""Added where a Trainer has no callback of the class."""


def with_safeguards(trainer: lightning.Trainer) -> list[Callback]:
    """Return the safeguards that a Trainer lacks; put those that come first to the front."""
    present: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    present = with_batch_check(in_setup_order(present), trainer.datamodule)  # type: ignore[attr-defined]
    trainer.callbacks = present  # type: ignore[attr-defined]
    return [kind() for kind in SAFEGUARDS if not any(isinstance(c, kind) for c in present)]


__all__ = [
    "SAFEGUARDS",
    "FiniteGuard",
    "HealthWarnings",
    "ModelsFirst",
    "StepIntervals",
    "with_safeguards",
]
