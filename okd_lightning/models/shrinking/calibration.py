"""Calibration: the loss of a model on some rows, and its distance from the uncut model.

The teacher's hidden states at the loss positions are kept. Its logits are computed again, tile by
tile, for each measurement, so that memory does not grow with tokens × vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from okd_lightning.divergences import ForwardKL
from okd_lightning.losses import DrawnLogProb, ExactDivergence, Quantity, Side, measure
from okd_lightning.models.causal_lm import LMHead
from okd_lightning.models.reading import hidden_at_loss
from okd_lightning.models.shrinking.layers import DecoderLayers, layer_input, layer_output
from okd_lightning.models.vocabulary import Vocabulary
from okd_lightning.records.sequences import Sequences

_KL: Quantity = ExactDivergence(ForwardKL())
_LOGPROB: Quantity = DrawnLogProb("student")


@dataclass(frozen=True)
class Loss:
    """Measurement of a candidate, in nats per loss token.

    Attributes:
        cross_entropy: Of the target tokens.
        forward_kl: KL(teacher‖candidate).
        influences: 1 − cos(h_in, h_out) of each layer, mean over real tokens; 0 for a skipped one.
    """

    cross_entropy: float
    forward_kl: float
    influences: tuple[float, ...]


class Calibration:
    """Rows, the model that is cut, and its hidden states before any cut.

    Args:
        model: The teacher, in eval mode; candidates are changes of its forward pass.
        batches: At least one; each is one forward pass.
        vocabulary: The ids that are compared.
        name: Origin of the rows, for reports.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batches: Sequence[Sequences],
        vocabulary: Vocabulary,
        name: str = "rows",
    ) -> None:
        self.model = model
        self.name = name
        self.layers = DecoderLayers.of(model)
        self.vocabulary = vocabulary
        self._batches = tuple(batches)
        self._head = LMHead.of(model, vocabulary)
        with torch.no_grad():
            self._teacher = tuple(hidden_at_loss(model, b, packs=False) for b in self._batches)

    @property
    def num_tokens(self) -> int:
        """Number of loss tokens."""
        return sum(len(hidden) for hidden in self._teacher)

    @torch.no_grad()
    def loss(self) -> Loss:
        """Measure the model as it runs now: with skipped layers, or weights set to zero."""
        sums = torch.zeros(2, dtype=torch.float64)
        with _influences(self.layers) as (begin, influences):
            for batch, teacher in zip(self._batches, self._teacher, strict=True):
                begin(batch.attention_mask)
                found = measure(
                    (_LOGPROB, _KL),
                    Side(hidden_at_loss(self.model, batch, packs=False), self._head),
                    Side(teacher, self._head),
                    batch.targets,
                    self.vocabulary.size,
                )
                values = torch.stack([found[_LOGPROB], found[_KL]])
                sums += values.double().sum(1).cpu()
            per_layer = influences()
        logprob, kl = (sums / self.num_tokens).tolist()
        return Loss(-logprob, kl, per_layer)

    @torch.no_grad()
    def run(self, begin: Callable[[Tensor], None]) -> None:
        """Run the model over all rows; ``begin`` gets each batch's [batch, seq] mask before it."""
        for batch in self._batches:
            begin(batch.attention_mask)
            hidden_at_loss(self.model, batch, packs=False)


@contextmanager
def _influences(
    layers: DecoderLayers,
) -> Iterator[tuple[Callable[[Tensor], None], Callable[[], tuple[float, ...]]]]:
    """Hook all layers; yield a setter of the batch's mask, and the means so far."""
    sums, counts = [0.0] * len(layers), [0] * len(layers)
    masks: list[Tensor] = []

    def hook(number: int) -> Callable[..., None]:
        def add(module: object, args: tuple, kwargs: dict, output: object) -> None:
            before, after = layer_input(args, kwargs), layer_output(output)
            if before.shape[:-1] != masks[-1].shape:  # a pass that resets a model's lengths
                return
            cosine = torch.cosine_similarity(before.float(), after.float(), dim=-1)
            chosen = (1 - cosine)[masks[-1]]
            sums[number] += float(chosen.sum())
            counts[number] += len(chosen)

        return add

    handles = [
        layer.register_forward_hook(hook(number), with_kwargs=True)
        for number, layer in enumerate(layers.modules)
    ]
    try:
        yield (
            masks.append,
            lambda: tuple(s / max(1, c) for s, c in zip(sums, counts, strict=True)),
        )
    finally:
        for handle in handles:
            handle.remove()
