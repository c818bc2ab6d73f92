"""Masked sums of per-token values, and their divisor.

Owns the reduction of per-token values to a scalar, and the divisor of that scalar. Every loss of
the library ends here, so that its gradient does not depend on how a batch is divided into
micro-batches, ranks or tiles.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from okd_lightning.errors import ConfigError
from okd_lightning.records.batches import SOURCES, DistillBatch, LossOutput, SampledCounts, Source

NormalizationName: TypeAlias = Literal["running_mean", "constant", "token_mean"]
"""Divisor of the sum over the student's sampled rows; see ``Normalization``."""


@dataclass(frozen=True)
class Normalization:
    """Divisor of a term's sum over an optimizer step.

    Rows of the dataset and of the teacher count by their loss tokens. Rows that the student
    sampled (also from a mixture with the teacher, or replayed) count by their number times

    * ``running_mean``: the mean of loss tokens per rollout in earlier rollout batches;
    * ``constant``: the longest response (``data.max_response_length``);
    * a number: that many tokens.

    None of these depends on what this step sampled, so that the expected gradient is that of the
    expected sum. With ``token_mean`` they count by their loss tokens, a ratio estimator whose bias
    falls with the number of rollouts (docs/opd.md). A term with several sources adds their counts.

    Args:
        by: One of these names, or the number.

    Raises:
        ConfigError: It is none of them.
    """

    by: str | int | float = "running_mean"

    def __post_init__(self) -> None:
        is_name = self.by in get_args(NormalizationName)
        if not is_name and (isinstance(self.by, (str, bool)) or not 0 < self.by < math.inf):
            raise ConfigError(
                f"model.normalization is {self.by!r}; expected running_mean, constant, token_mean, "
                "or a number of tokens per rollout above 0"
            )

    def divisor(self, batch: DistillBatch, sources: Sequence[Source]) -> int | float:
        """Return the divisor of the sum over all rows of some sources in the optimizer step.

        Args:
            batch: One micro-batch of the step, with the step's counts.
            sources: A term's sources.

        Raises:
            ConfigError: The batch lacks the counts.
        """
        tokens = dict(zip(SOURCES, step_tokens(batch), strict=True))
        given = sum(tokens[source] for source in sources if source != "student")
        if "student" not in sources:
            return given
        if self.by == "token_mean":
            return given + tokens["student"]
        if batch.sampled is None:
            if not tokens["student"]:
                return given
            raise ConfigError(
                "a training batch with sampled responses and without their number: train on a "
                "RolloutDataModule's batches, set DistillBatch.sampled, or give "
                "model.normalization token_mean"
            )
        return given + batch.sampled.rollouts * self._tokens_per_rollout(batch.sampled)

    def factor(
        self,
        batch: DistillBatch,
        sources: Sequence[Source],
        accumulate_grad_batches: int,
        world_size: int,
    ) -> float:
        """Return the factor on a micro-batch's sum; see ``divisor`` and ``step_factor``."""
        divisor = self.divisor(batch, sources)
        return step_factor(divisor, accumulate_grad_batches, world_size)

    def _tokens_per_rollout(self, sampled: SampledCounts) -> float:
        if self.by == "running_mean":
            return sampled.mean_tokens
        return float(sampled.max_tokens if self.by == "constant" else self.by)


def step_tokens(batch: DistillBatch) -> tuple[int, ...]:
    """Return the loss tokens of the batch's whole optimizer step, one number per source.

    Raises:
        ConfigError: The batch lacks them.
    """
    if batch.step_counts is None:
        raise ConfigError(
            "a training batch without step_counts: train on a RolloutDataModule's batches, or set "
            "DistillBatch.step_counts to the optimizer step's loss tokens by source"
        )
    return batch.step_counts


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum ``values`` where ``mask`` is True, in float32 or wider.

    Masked-out values may be infinite or NaN: they contribute exactly zero to the sum and to the
    gradient (a product with 0 would give NaN). If the mask is all False, the result is a zero that
    is still connected to the graph, so that the rank takes part in the backward pass and its
    collectives.

    Args:
        values: Any shape, nats per token.
        mask: Same shape, boolean, True = contributes.

    Returns:
        Scalar; gradient flows to values whose mask is True.
    """
    wide = values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
    return torch.where(mask, wide, torch.zeros_like(wide)).sum()


def loss_output(values: Tensor, mask: Tensor, **metrics: Tensor) -> LossOutput:
    """Return a term's LossOutput from per-token values (nats) and the term's mask.

    Args:
        values: [positions] nats, with gradient.
        mask: [positions] True where the term applies.
        **metrics: Further [positions] values, summed over the same mask without gradient.
    """
    return LossOutput(
        sum=masked_sum(values, mask),
        count=mask.sum(),
        metrics={name: masked_sum(value.detach(), mask) for name, value in metrics.items()},
    )


def step_factor(divisor: int | float, accumulate_grad_batches: int, world_size: int) -> float:
    """Return the factor on a micro-batch's sum: one over the divisor of its whole step.

    Lightning divides every micro-batch's loss by ``accumulate_grad_batches``, and DDP and FSDP
    average gradients over ranks; the factor cancels both, so that the optimizer gets the gradient
    of (sum over all tokens of the step) / divisor.

    Args:
        divisor: See ``Normalization``; 0 where the step has no tokens.
        accumulate_grad_batches: Micro-batches per optimizer step.
        world_size: Ranks that gradients are averaged over.
    """
    return accumulate_grad_batches * world_size / (divisor or 1)
