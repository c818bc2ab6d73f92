"""Distillation of hidden states: a distance between the student's and the teacher's layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

import lightning

from okd_lightning.callbacks.methods.base import DistillationCallback
from okd_lightning.errors import ConfigError
from okd_lightning.losses import HiddenDistance, Measured, Quantity
from okd_lightning.losses.reduction import loss_output
from okd_lightning.losses.states import HiddenLoss
from okd_lightning.models import LayerPair, check_layers, load_model_config
from okd_lightning.records.batches import SOURCES, LossOutput, Source
from okd_lightning.training.module import DistillationModule


class HiddenStates(DistillationCallback):
    """Match hidden states of the teacher's layers, next to any other method (FitNets, 1412.6550).

    The loss of a token is the mean over pairs of layers of ‖W h_S - h_T‖² / ‖h_T‖² ("mse") or of
    1 - cos(W h_S, h_T) ("cosine"), at the position that predicts the token. h_T is a constant.
    W is a trained projector where the widths differ and the identity where they are equal. It is
    seeded, in the optimizer with the student's learning rate and no weight decay, in checkpoints,
    and in no exported model. Logged: ``train/<name>``, the mean distance.

    It acts on the rows that the other methods of the run need. By itself it trains neither the
    student's head nor its later layers. It needs a teacher in memory with the run's tokenizer.

    Args:
        layers: From the student's layers to the teacher's: 0 is the embeddings' output, k the
            output of block k, -1 the state after the final norm.
        loss: "mse" or "cosine".
        weight: Factor on this term's mean loss.
        name: Logged as ``train/<name>``; two methods of one class need different names.

    Raises:
        ConfigError: No layers, an unknown loss, or (at the start of a run) layers that a model does
            not have.
    """

    on_policy_fraction = None
    sources: tuple[Source, ...] = SOURCES

    def __init__(
        self,
        layers: dict[int, int],
        loss: HiddenLoss = "mse",
        weight: float = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__(weight, name)
        self.layers = _checked_layers(layers, self.name)
        if loss not in (known := get_args(HiddenLoss)):
            raise ConfigError(f"{self.name}: loss is {loss!r}; expected {' or '.join(known)}")
        self._distance = HiddenDistance(tuple(self.layers.items()), loss, self.name)

    @property
    def quantities(self) -> tuple[Quantity, ...]:
        """The distance."""
        return (self._distance,)

    def prepare(self, trainer: lightning.Trainer, module: DistillationModule, stage: str) -> None:
        """Have projectors made where widths differ.

        Raises:
            ConfigError: A model has no such layer.
        """
        if stage != "fit":
            return
        pair = module.pair
        size = pair.vocabulary.size
        student = load_model_config(pair.student_source, "--model.student", size)
        check_layers(self.layers, student, pair.teacher.config(student), self.name)
        distance = self._distance
        pairs = (LayerPair(distance.projector(pair), *pair) for pair in distance.pairs)
        module.pair.layer_pairs = (*module.pair.layer_pairs, *pairs)

    def loss(self, measured: Measured) -> LossOutput:
        """Return the sum of the mean distances, without unit."""
        return loss_output(measured[self._distance], measured.mask(self.sources))


def _checked_layers(layers: Mapping[int, int], name: str) -> dict[int, int]:
    is_mapping = isinstance(layers, Mapping) and bool(layers)
    if not is_mapping or not all(type(i) is int for pair in layers.items() for i in pair):
        raise ConfigError(
            f"{name}: layers is {layers!r}; expected numbers of the student's layers with those of "
            "the teacher's, such as {2: 4, -1: -1}"
        )
    return dict(sorted(layers.items()))  # a saved config has another order: that of the projectors
