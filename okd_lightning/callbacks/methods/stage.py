"""A method for a part of the run: SFT, then GKD, then OPD+ in one fit."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback

from okd_lightning.callbacks.methods.base import Method
from okd_lightning.divergences.named_classes import as_object
from okd_lightning.errors import ConfigError
from okd_lightning.losses import Term
from okd_lightning.training.module import DistillationModule
from okd_lightning.training.run_settings import call_text

_PASSED_ON = ("state_dict", "load_state_dict")
"""Hooks that a stage calls on its method."""


class Stage(Method):
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
        method: Method,
        start: int = 0,
        end: int | None = None,
        first_factor: float = 1.0,
        last_factor: float | None = None,
    ) -> None:
        method = as_object(method, Method, "method of a Stage", "KD()")
        super().__init__(method.name)
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

    @property
    def terms(self) -> tuple[Term, ...]:
        """The method's terms, with the stage's window and factor."""
        return tuple(
            replace(
                term,
                weight=partial(self._weight, term.weight),
                window=(self.start, self.end),
                kind=f"Stage({term.kind})",
                settings={
                    "class": type(self).__name__,
                    **self.given_arguments,
                    "method": call_text(term.settings),
                },
            )
            for term in self.method.terms
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the method's state."""
        return self.method.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Pass the state to the method."""
        self.method.load_state_dict(state_dict)

    def _weight(self, weight: Callable[[int], float], step: int) -> float:
        """Return a term's weight times the interpolated factor; 0 outside the window."""
        if step < self.start or (self.end is not None and step >= self.end):
            return 0.0
        share = 0.0
        if self.end is not None and self.end - self.start > 1:
            share = (step - self.start) / (self.end - self.start - 1)
        factor = self.first_factor + share * (self.last_factor - self.first_factor)
        return factor * weight(step)

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


def _check_method(method: Method) -> None:
    """Refuse methods with Lightning hooks or an engine: a stage passes on only the term."""
    if type(method).wrap_engine is not Method.wrap_engine:
        raise ConfigError(
            f"Stage of {method.name}: {type(method).__name__} changes the generation of responses "
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
        and name not in _PASSED_ON
        and getattr(type(method), name) is not getattr(Method, name)
    ]
    if hooks:
        raise ConfigError(
            f"Stage of {method.name}: {type(method).__name__} has {', '.join(hooks)} of its own, "
            "which a Stage does not call; put that into another callback (or into prepare)"
        )
