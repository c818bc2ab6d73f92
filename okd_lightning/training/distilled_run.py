"""The interface of the DistillationModule for the parts that it is made of, and for its callbacks.

``module`` imports these parts, so that they cannot import it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, cast

import lightning
import torch
from torch import nn
from transformers import PreTrainedModel

from okd_lightning.engines import RolloutEngine
from okd_lightning.losses import Measured, Quantity, Term
from okd_lightning.losses.reduction import Normalization
from okd_lightning.models import Projectors
from okd_lightning.records.batches import DistillBatch
from okd_lightning.training.frozen_parts import FrozenParts
from okd_lightning.training.pair import Pair


class DistilledRun(Protocol):
    """The DistillationModule, in a run or outside of one.

    Attributes:
        pair: The student, its teacher, their vocabulary, placement and engine.
        student: The student's model, registered for Lightning; None before it is built.
        teacher: The teacher's models; None before it is built, and where it has none.
        projectors: Maps between hidden states of other widths; None without any.
        frozen_parts: The frozen weights, which are hidden from callbacks.
        terms: The methods of the run.
        acting: Those of the last micro-batch.
        normalization: The divisor of sums over on-policy samples.
        learning_rate: The student's learning rate, before the schedule.
        weight_decay: Weight decay of the student's matrices.
        chosen_options: Command → options that the user chose for it; None in a run from Python.
    """

    pair: Pair
    student: PreTrainedModel | None
    teacher: nn.Module | None
    projectors: Projectors | None
    frozen_parts: FrozenParts
    terms: list[Term]
    acting: list[Term]
    normalization: Normalization
    learning_rate: float
    weight_decay: float
    chosen_options: Mapping[str, Mapping[str, Any]] | None

    @property
    def trainer(self) -> lightning.Trainer:
        """The Trainer; raises outside of one."""

    @property
    def device(self) -> torch.device:
        """The device of the module."""

    def measure(self, batch: DistillBatch, quantities: Sequence[Quantity]) -> Measured:
        """Run both sides once over a batch and measure."""

    def build_engine(self, model: PreTrainedModel) -> RolloutEngine:
        """Build the built-in engine on a model of the pair."""

    @property
    def log(self) -> Callable[..., None]:
        """Lightning's ``log``."""

    @property
    def log_dict(self) -> Callable[..., None]:
        """Lightning's ``log_dict``."""


def distilled_run(module: lightning.LightningModule) -> DistilledRun | None:
    """Return a DistillationModule as its parts see it; None for another kind of module."""
    has_pair = isinstance(getattr(module, "pair", None), Pair)
    return cast(DistilledRun, module) if has_pair else None
