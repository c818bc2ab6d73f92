"""Which terms act in an optimizer step, their factors, and what is checked of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from okd_lightning.errors import ConfigError
from okd_lightning.losses import Term, WeightedLoss, WeightedTerm
from okd_lightning.records import SOURCES, DistillBatch, LossOutput
from okd_lightning.reduction import step_factor
from okd_lightning.rollouts.plan import acts_in


def acting_terms(
    terms: Sequence[Term],
    batch: DistillBatch,
    step: int,
    accumulate_grad_batches: int,
    world_size: int,
) -> list[WeightedTerm]:
    """The terms of optimizer step ``step``, each with its weight over the step's loss tokens.

    Raises:
        ConfigError: No term acts, or the batch does not say how many tokens its step has.
    """
    acting = [term for term in terms if acts_in(term, step)]
    if not acting:
        raise ConfigError(
            f"no method acts from optimizer step {step} on; end the run there "
            f"(--trainer.max_steps {step}), or leave the last stage's end out"
        )
    windows = (accumulate_grad_batches, world_size)
    return [
        WeightedTerm(term, term.weight_at(step) * step_factor(step_count(batch, term), *windows))
        for term in acting
    ]


def step_means(
    terms: Sequence[WeightedTerm], loss: WeightedLoss, batch: DistillBatch, step: int
) -> Mapping[str, Tensor]:
    """What this micro-batch adds to the logged means over the step's tokens, without gradient."""
    means: dict[str, Tensor] = {}
    for weighted, output in zip(terms, loss.outputs, strict=True):
        term, count = weighted.term, step_count(batch, weighted.term)
        if count:
            parts = {term.name: output.sum, **output.metrics}
            means.update({name: value / count for name, value in parts.items()})
            means["loss"] = means.get("loss", 0) + term.weight_at(step) * means[term.name]
    return means


def check_counts(
    terms: Sequence[WeightedTerm], outputs: Sequence[LossOutput], batch: DistillBatch
) -> None:
    """A term is divided by all loss tokens of its sources, so it has to sum over all of them.

    Raises:
        ConfigError: One sums over other tokens.
    """
    for weighted, output in zip(terms, outputs, strict=True):
        term = weighted.term
        is_own = torch.isin(batch.source, batch.source.new_tensor(_codes(term)))
        own, expected = int(output.count), int(batch.mask[is_own, 1:].sum())
        if own != expected:
            raise ConfigError(
                f"method {term.name} sums over {own} tokens of a batch, but its sources "
                f"({', '.join(term.sources)}) hold {expected}, which is what it is divided by; "
                "give the tokens that it leaves out the value 0, and do not mask them"
            )


def step_count(batch: DistillBatch, term: Term) -> int:
    """Loss tokens of a term in the whole optimizer step.

    Raises:
        ConfigError: The batch does not say.
    """
    if batch.step_counts is None:
        raise ConfigError(
            "a training batch without step_counts: train on a RolloutDataModule's batches, or set "
            "DistillBatch.step_counts to the optimizer step's loss tokens by source"
        )
    return sum(batch.step_counts[code] for code in _codes(term))


def _codes(term: Term) -> list[int]:
    return [SOURCES.index(source) for source in term.sources]
