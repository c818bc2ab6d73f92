"""Distance of on-policy samples from the student that trains on them (``data.rollout_lag``).

With rollouts ahead of training, the samples are an earlier student's. Owns two measures of it from
ρ = p_student/p_sampler of the sampled tokens: the effective sample size and the mean |ln ρ|.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from okd_lightning.losses import DrawnLogProb, Measured, WeightedLoss, WeightedTerm
from okd_lightning.records.batches import LossOutput

_STUDENT = DrawnLogProb("student")
_SUMS = ("okd_rho", "okd_rho_square", "okd_rho_log", "okd_rho_count")


class SampleAge:
    """Sums over the student's sampled tokens of an optimizer step."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None

    def watched(self, terms: Sequence[WeightedTerm]) -> list[WeightedTerm]:
        """Return the terms; the first one over the student's rows also measures ρ."""
        found = list(terms)
        for number, weighted in enumerate(terms):
            term = weighted.term
            if "student" in term.sources and not term.reads_states:
                own = term.quantities
                quantities = own if _STUDENT in own else (*own, _STUDENT)
                loss = partial(_with_ratio, term.loss)
                found[number] = replace(
                    weighted, term=replace(term, quantities=quantities, loss=loss)
                )
                break
        return found

    def taken(self, loss: WeightedLoss) -> WeightedLoss:
        """Add a micro-batch's sums; return its loss without them."""
        outputs = []
        for output in loss.outputs:
            metrics = dict(output.metrics)
            if _SUMS[0] in metrics:
                sums = torch.stack([metrics.pop(name).float() for name in _SUMS])
                self._sums = sums if self._sums is None else self._sums + sums
            outputs.append(replace(output, metrics=metrics))
        return replace(loss, outputs=tuple(outputs))

    def means(self, reduce_sum: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Return the measures of the step that ends, and reset them; none without samples.

        Args:
            reduce_sum: Sums a tensor over all ranks; called on all ranks or on none.

        Returns:
            ``rollout/effective_sample_size``, (Σρ)²/(N Σρ²) over its N sampled tokens, at most 1;
            and ``rollout/abs_log_ratio``, the mean |ln ρ| in nats.
        """
        if self._sums is None:
            return {}
        total, squares, logs, count = reduce_sum(self._sums)
        self._sums = None
        if not count:
            return {}
        return {
            "rollout/effective_sample_size": total.square() / (count * squares),
            "rollout/abs_log_ratio": logs / count,
        }


def _with_ratio(loss: Callable[[Measured], LossOutput], measured: Measured) -> LossOutput:
    """Return a term's loss, with sums of ρ, ρ², |ln ρ| and 1 over the student's tokens."""
    output = loss(measured)
    mask = measured.mask(("student",))
    with torch.no_grad():
        logprobs = measured[_STUDENT].detach()
        logs = (logprobs - measured.sampler_logprobs.to(logprobs.dtype)).where(mask, 0.0)
        ratio = logs.exp().where(mask, 0.0)
        values = ratio, ratio.square(), logs.abs(), mask.to(logprobs.dtype)
        sums = {name: value.sum() for name, value in zip(_SUMS, values, strict=True)}
    return replace(output, metrics={**output.metrics, **sums})
