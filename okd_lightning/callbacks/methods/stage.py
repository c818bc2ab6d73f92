"""A method for a part of the run: SFT, then GKD, then OPD+ in one fit."""

from __future__ import annotations

import math

import lightning
from lightning.pytorch.callbacks import Callback

from okd_lightning.callbacks.methods.base import DistillationCallback
from okd_lightning.divergences.named_classes import as_object
from okd_lightning.errors import ConfigError
from okd_lightning.losses import Measured, Quantity, RowScorer
from okd_lightning.records.batches import LossOutput, Source
from okd_lightning.training.module import DistillationModule


class Stage(DistillationCallback):
    """Limits a method to a range of optimizer steps, and can change its weight within it.

    The methods that act in a step determine the sources of its rows, so the on-policy share changes
    with them:

        callbacks=[Stage(SFT(), end=100), Stage(GKD(), start=100, end=300), Stage(OPDPlus(), 300)]

    Args:
        method: The method; its own weight is multiplied by the factors here.
        start: First optimizer step, from 0.
        end: First optimizer step in which it no longer acts; None for the end of the run.
        first_factor: Factor on the method's weight at ``start``.
        last_factor: Factor on the method's weight in the last step before ``end``, with linear
            interpolation from ``first_factor``; None for no change.

    Raises:
        ConfigError: An empty window, a factor below 0 or 0 throughout, a change without an end, a
            stage in a stage, or a method with its own Lightning hooks, which are not called.
    """

    def __init__(
        self,
        method: DistillationCallback,
        start: int = 0,
        end: int | None = None,
        first_factor: float = 1.0,
        last_factor: float | None = None,
    ) -> None:
        method = as_object(method, DistillationCallback, "method of a Stage", "KD()")
        super().__init__(method.weight, method.name)
        _check_method(method)
        if start < 0 or (end is not None and end <= start):
            raise ConfigError(f"Stage of {method.name}: no step lies from {start} to before {end}")
        for factor in (first_factor, last_factor):
            if factor is not None and not (math.isfinite(factor) and factor >= 0):
                raise ConfigError(f"Stage of {method.name}: a factor is {factor}, expected from 0")
        if not first_factor and not last_factor:
            raise ConfigError(f"Stage of {method.name}: with the factor 0 throughout it never acts")
        if last_factor is not None and end is None:
            raise ConfigError(
                f"Stage of {method.name}: last_factor {last_factor} needs an end to be reached at"
            )
        self.method = method
        self.start, self.end = start, end
        self.first_factor = first_factor
        self.last_factor = first_factor if last_factor is None else last_factor
        self.is_positionwise = method.is_positionwise
        self.mixes_rows = method.mixes_rows
        self.share_at = method.share_at
        self.needs_teacher_prompt = method.needs_teacher_prompt
        self.further_terms = tuple(
            Stage(term, start, end, first_factor, last_factor) for term in method.further_terms
        )

    @property
    def kind(self) -> str:
        """Kind with the method's, so that a run resumes with the same method in the stage."""
        return f"Stage({self.method.kind})"

    @property
    def window(self) -> tuple[int, int | None]:
        """From ``start`` to before ``end``."""
        return (self.start, self.end)

    def weight_at(self, step: int) -> float:
        """Return the method's weight times the interpolated factor; 0 outside the window."""
        if step < self.start or (self.end is not None and step >= self.end):
            return 0.0
        share = 0.0
        if self.end is not None and self.end - self.start > 1:
            share = (step - self.start) / (self.end - self.start - 1)
        factor = self.first_factor + share * (self.last_factor - self.first_factor)
        return factor * self.method.weight_at(step)

    @property
    def sources(self) -> tuple[Source, ...]:
        """Sources of the method."""
        return self.method.sources

    @property
    def on_policy_fraction(self) -> float | None:
        """Fraction of the method, while it acts."""
        return self.method.on_policy_fraction

    @property
    def quantities(self) -> tuple[Quantity, ...]:
        """Quantities of the method."""
        return self.method.quantities

    @property
    def scorer(self) -> RowScorer | None:  # type: ignore[override]
        """Scorer of the method."""
        return self.method.scorer

    def on_train_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Refuse a stage that the run never reaches.

        Raises:
            ConfigError: It begins after the run's last step.
        """
        end = trainer.estimated_stepping_batches
        if self.start >= end and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            raise ConfigError(
                f"Stage of {self.method.name}: it begins at step {self.start}, and the run ends at "
                f"step {int(end)}; let it begin earlier, or train longer (--trainer.max_steps, "
                "--trainer.max_epochs)"
            )

    def prepare(self, trainer: lightning.Trainer, module: DistillationModule, stage: str) -> None:
        """Call the method's ``prepare``."""
        self.method.prepare(trainer, module, stage)

    def loss(self, measured: Measured) -> LossOutput:
        """Return the method's loss."""
        return self.method.loss(measured)


def _check_method(method: DistillationCallback) -> None:
    """Refuse methods with Lightning hooks or an engine: a stage passes on only the term."""
    if type(method).wrap_engine is not DistillationCallback.wrap_engine:
        raise ConfigError(
            f"Stage of {method.name}: {type(method).__name__} changes how responses are written, "
            "for the whole run; it cannot act in a part of it"
        )
    if isinstance(method, Stage):
        raise ConfigError(
            f"Stage of {method.name}: a stage in a stage; give one of them both start and end"
        )
    hooks = [
        name
        for name in vars(Callback)
        if not name.startswith("_")
        and getattr(type(method), name) is not getattr(DistillationCallback, name)
    ]
    if hooks:
        raise ConfigError(
            f"Stage of {method.name}: {type(method).__name__} has {', '.join(hooks)} of its own, "
            "which a Stage does not call; put that into another callback (or into prepare)"
        )
