"""The interface of a method: it declares quantities, and turns their values into a loss sum."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, Self

import lightning
from lightning.pytorch.callbacks import Callback

from okd_lightning.engines import RolloutEngine
from okd_lightning.errors import ConfigError
from okd_lightning.losses import Measured, Quantity, RowScorer, Term
from okd_lightning.losses.terms import Constant
from okd_lightning.records.batches import SOURCES, LossOutput, Source
from okd_lightning.training.module import DistillationModule
from okd_lightning.training.run_settings import given_arguments


class Method(Callback, ABC):
    """A training method, as a Lightning callback: it adds its terms to a run.

    Args:
        name: See ``DistillationCallback``.

    Attributes:
        precedes_models: Its ``setup`` runs before the models are built, so that they are built for
            the run's methods, and not at all if a setting is refused.
        given_arguments: The constructor's arguments, as primitives.
    """

    precedes_models: bool = True
    given_arguments: Mapping[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Record the constructor's arguments, for the run's first log line and its loggers."""
        made = super().__new__(cls)
        made.given_arguments = given_arguments(cls, args, kwargs)
        return made

    def __init__(self, name: str | None = None) -> None:
        self.name = name or snake_case(type(self).__name__)

    @property
    @abstractmethod
    def terms(self) -> tuple[Term, ...]:
        """Terms of the method, from its present attributes; built once per run, at ``setup``."""

    @cached_property  # Lightning's profiler reads it around every hook
    def state_key(self) -> str:
        """Key of this callback's state in checkpoints, unique among callbacks of its class."""
        return f"{type(self).__qualname__}.{self.name}"

    def wrap_engine(self, engine: RolloutEngine) -> RolloutEngine:
        """Return the engine of training's responses; ``engine`` unchanged by default.

        A method that changes the generation (sampling from a mixture, replay of earlier responses)
        returns its own ``RolloutEngine``, which calls ``engine`` for the rest. It is called once a
        run, after ``prepare``. All methods of the run get its rows; validation does not use it.
        """
        return engine

    def setup(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str
    ) -> None:
        """Register the terms with the module.

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
        """Prepare the run for the method, in every stage; nothing by default."""


class DistillationCallback(Method):
    """A method, as a Lightning callback: one weighted term of a run's loss.

    Several methods on one Trainer are summed, each divided by its own count. A method never sees
    logits: it names quantities, the module measures each of them once, and ``loss`` sums them over
    the method's positions. A complete method:

        class TopMass(DistillationCallback):
            'Forward KL, weighted by the certainty of the teacher.'

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
        sources: Sources of the rows that it acts on: "dataset", "student" or "teacher".
        on_policy_fraction: Share of optimizer steps with on-policy samples, in [0, 1], or None to
            use the rows that other methods need.
        quantities: Quantities that the module measures for it.
        scorer: Scorer that gives the student's responses an advantage, or None.
        is_positionwise: Whether ``loss`` of some positions depends on these positions alone, with
            gradient only through the measured values. The module then calls ``loss`` on parts of a
            batch and differentiates each part at once, which is faster and needs less memory. Set
            it to False if a position's loss depends on others (reward-to-go over a response).
        mixes_rows: Whether every optimizer step has both on-policy and other rows, in the share of
            ``on_policy_fraction``, instead of one random kind per step.
        discount: Weight of a later token's reward in an earlier one's advantage, where there are
            later rewards; 0 elsewhere.
        share_at: The on-policy share by optimizer step, if it changes in a run (a method of one
            argument), or None. Its value for a step must not change once the step's rows exist.
            ``on_policy_fraction`` then only determines which sources occur.
        needs_teacher_prompt: Whether the teacher needs its own prompts (a privileged teacher); a
            run on data without them is then refused.
        further_terms: Further methods that act with this one, each with its own rows, count and
            divisor.
    """

    scorer: RowScorer | None = None
    is_positionwise: bool = True
    mixes_rows: bool = False
    discount: float = 0.0
    share_at: Callable[[int], float] | None = None
    needs_teacher_prompt: bool = False
    further_terms: tuple[DistillationCallback, ...] = ()

    def __init__(self, weight: float = 1.0, name: str | None = None) -> None:
        if not (math.isfinite(weight) and weight > 0):
            raise ConfigError(
                f"{type(self).__name__}: weight must be a number above 0, got {weight}"
            )
        super().__init__(name)
        self.weight = weight

    @property
    @abstractmethod
    def sources(self) -> tuple[Source, ...]:
        """Sources of the rows that the method acts on."""

    @property
    @abstractmethod
    def on_policy_fraction(self) -> float | None:
        """Share of optimizer steps with on-policy samples, or None."""

    @property
    @abstractmethod
    def quantities(self) -> tuple[Quantity, ...]:
        """Quantities that the module measures."""

    @abstractmethod
    def loss(self, measured: Measured) -> LossOutput:
        """Return the sum over this method's positions of one micro-batch, with its count."""

    @property
    def term(self) -> Term:
        """The method's own term, from its present attributes; built once per run, at ``setup``.

        Raises:
            ConfigError: Sources that do not exist, or quantities that cannot be measured once and
                looked up.
        """
        sources, quantities = self.sources, self.quantities
        _check_sources(self.name, sources)
        _check_quantities(self.name, quantities, self.quantities)
        return Term(
            name=self.name,
            sources=sources,
            quantities=quantities,
            loss=self.loss,
            weight=Constant(self.weight),
            on_policy_fraction=self.on_policy_fraction,
            share_at=self.share_at,
            mixes_rows=self.mixes_rows,
            is_positionwise=self.is_positionwise,
            scorer=self.scorer,
            discount=self.discount,
            needs_teacher_prompt=self.needs_teacher_prompt,
            wrap_engine=self.wrap_engine,
            kind=type(self).__name__,
            settings={"class": type(self).__name__, **self.given_arguments},
        )

    @property
    def terms(self) -> tuple[Term, ...]:
        """All terms of the method: its own and its further ones."""
        return (self.term, *(term for method in self.further_terms for term in method.terms))


def _check_sources(name: str, sources: tuple[Source, ...]) -> None:
    if isinstance(sources, str) or not sources or set(sources) - set(SOURCES):
        raise ConfigError(
            f"method {name}: sources is {sources!r}; expected a tuple of one or more of "
            f"{', '.join(SOURCES)}"
        )


def _check_quantities(
    name: str, quantities: tuple[Quantity, ...], again: tuple[Quantity, ...]
) -> None:
    for quantity in quantities:
        if not isinstance(quantity, Quantity) or not hasattr(quantity, "needs_teacher"):
            raise ConfigError(
                f"method {name}: {quantity!r} is not a Quantity with needs_teacher (True or "
                "False) set; see the class Quantity for a complete one"
            )
    if type(quantities) is not tuple or quantities != again:
        raise ConfigError(
            f"method {name}: quantities are not a tuple that is equal at every call; make "
            "each Quantity a frozen dataclass"
        )


def check_fraction(name: str, value: float) -> float:
    """Return ``value`` if it is in [0, 1].

    Raises:
        ConfigError: It is outside.
    """
    if not 0 <= value <= 1:
        raise ConfigError(f"{name} must be between 0 and 1, got {value}")
    return value


def snake_case(name: str) -> str:
    """Convert a class name to a metric name: RougeL becomes rouge_l."""
    words = r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])"
    return re.sub(words, "_", name).lower()
