"""The contract of a method: declare what is needed, turn one step's quantities into a sum."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Self

import lightning
from lightning.pytorch.callbacks import Callback

from okd_lightning.engines import Writer
from okd_lightning.errors import ConfigError
from okd_lightning.losses import Measured, Quantity, RowScorer
from okd_lightning.records.batches import LossOutput, Source
from okd_lightning.training.module import DistillationModule
from okd_lightning.training.run_settings import given_arguments


class DistillationCallback(Callback, ABC):
    """A method, as a Lightning callback: one weighted term of a run's loss.

    Several on one Trainer add up, each divided by its own count. A method never sees logits:
    it names quantities, the module measures each of them once, and ``loss`` sums them over the
    positions that the method acts on. A complete method:

        class TopMass(DistillationCallback):
            'Pulls the student where the teacher is sure of itself.'

            on_policy_fraction = 0.0
            sources = ("dataset",)
            quantities = (ExactDivergence(ForwardKL()), Entropy("teacher"))

            def loss(self, measured: Measured) -> LossOutput:
                divergence, entropy = (measured[q] for q in self.quantities)
                values = divergence * (-entropy.detach()).exp()
                return loss_output(values, measured.mask(self.sources))

    Args:
        weight: Factor on this term's mean loss.
        name: Logged as ``train/<name>``; by default the class name in snake case. Two methods of
            one class need different names.

    Attributes:
        sources: Who writes the rows that it acts on: "dataset", "student" or "teacher".
        on_policy_fraction: Share of optimizer steps whose responses the student writes, in [0, 1],
            or None where the method takes whatever rows others ask for.
        quantities: What the module has to measure for it.
        window: First optimizer step that it acts in, and the first one that it does not (Stage).
        scorer: What gives the student's responses a credit when they have been written, or None.
        is_positionwise: Whether ``loss`` of some positions depends on these positions alone, and
            learns nothing but through the measured values. The module then calls ``loss`` part by
            part and differentiates on the way, which is faster and needs less memory. Set it to
            False where a position's loss depends on others (reward-to-go over a response).
        mixes_rows: Whether every optimizer step holds both rows that the student wrote and given
            ones, in the share that it asks for, and not one kind by a coin a step.
        share_at: The on-policy share in an optimizer step, where it changes in a run (a method of
            one argument), or None. What it says of a step may not change once the step's rows are
            there. ``on_policy_fraction`` then only says which sources occur.
        precedes_models: Its ``setup`` runs before the models are built, so that they are built for
            the run's methods, and not at all where a setting is refused.
        needs_teacher_prompt: Whether the teacher must read prompts of its own (a privileged
            teacher); a run on data without them is then refused.
        further_terms: Terms that come with the method, each with rows, a count and a divisor of its
            own: losses on other rows that are not to share the method's divisor. The same ones at
            every call.
        given_arguments: The constructor's arguments, as primitives.
    """

    scorer: RowScorer | None = None
    is_positionwise: bool = True
    mixes_rows: bool = False
    share_at: Callable[[int], float] | None = None
    needs_teacher_prompt: bool = False
    precedes_models: bool = True
    further_terms: tuple[DistillationCallback, ...] = ()
    given_arguments: Mapping[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Keep what the constructor is given, for the run's first line and its loggers."""
        made = super().__new__(cls)
        made.given_arguments = given_arguments(cls, args, kwargs)
        return made

    def __init__(self, weight: float = 1.0, name: str | None = None) -> None:
        if not (math.isfinite(weight) and weight > 0):
            raise ConfigError(f"weight must be a number above 0, got {weight}")
        self.weight = weight
        self.name = name or snake_case(type(self).__name__)

    @property
    @abstractmethod
    def sources(self) -> tuple[Source, ...]:
        """Who writes the rows that the method acts on."""

    @property
    @abstractmethod
    def on_policy_fraction(self) -> float | None:
        """Share of optimizer steps that are the student's own generations."""

    @property
    @abstractmethod
    def quantities(self) -> tuple[Quantity, ...]:
        """What has to be measured."""

    @abstractmethod
    def loss(self, measured: Measured) -> LossOutput:
        """The sum over this method's positions of one micro-batch, with its count."""

    @property
    def window(self) -> tuple[int, int | None]:
        """The whole run."""
        return (0, None)

    @property
    def terms(self) -> tuple[DistillationCallback, ...]:
        """All terms of the method: itself and its further ones."""
        return (self, *self.further_terms)

    def weight_at(self, step: int) -> float:
        """The factor on this term's mean loss in optimizer step ``step``."""
        del step
        return self.weight

    @property
    def kind(self) -> str:
        """What checkpoints remember of it: a run is resumed with the same kinds of methods."""
        return type(self).__name__

    @property
    def state_key(self) -> str:
        """Stable key of this callback's state in checkpoints, also beside others of its class."""
        return f"{type(self).__qualname__}.{self.name}"

    def wrap_writer(self, writer: Writer) -> Writer:
        """What writes the training's responses in the place of ``writer``, which is given.

        A method that changes how responses come about (drawn from a mixture, taken from an earlier
        step) returns a ``Writer`` of its own, which calls ``writer`` for what it does not write
        itself. It is asked once a run, after ``prepare``; all methods of the run get its rows, and
        validation does not.
        """
        return writer

    def setup(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str
    ) -> None:
        """Register the term with the module.

        Raises:
            ConfigError: The module is not a DistillationModule.
        """
        if not isinstance(pl_module, DistillationModule):
            raise ConfigError(
                f"{type(self).__name__} works on a DistillationModule, "
                f"this Trainer fits a {type(pl_module).__name__}"
            )
        self.prepare(trainer, pl_module, stage)
        if stage == "fit":
            for term in self.terms:
                pl_module.add_term(term)

    def prepare(self, trainer: lightning.Trainer, module: DistillationModule, stage: str) -> None:
        """What the method needs of the run beside its term, in every stage; nothing by default."""


def check_fraction(name: str, value: float) -> float:
    """A share in [0, 1].

    Raises:
        ConfigError: It is outside.
    """
    if not 0 <= value <= 1:
        raise ConfigError(f"{name} must be between 0 and 1, got {value}")
    return value


def snake_case(name: str) -> str:
    """A class's name as metrics are called: RougeL becomes rouge_l."""
    words = r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])"
    return re.sub(words, "_", name).lower()
