"""Masked sums and the one division.

Owns: how per-token values become a scalar, and what a scalar is divided by. Every loss of the
library ends here, so that its gradient does not depend on how a batch was cut into micro-batches,
ranks or chunks.
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
"""By what the sum over the student's sampled rows is divided; see ``Normalization``."""


@dataclass(frozen=True)
class Normalization:
    """What a term's sum over an optimizer step is divided by.

    Rows of the data set and of the teacher count by their loss tokens. Rows that the student
    sampled (from a mixture with the teacher or replayed as well) count by their number times

    * ``running_mean``: the mean of loss tokens per rollout in earlier rollout batches;
    * ``constant``: the longest response (``data.max_response_length``);
    * a number: so many tokens;

    none of which depends on what this step sampled, so that the expected gradient is that of the
    expected sum; or, with ``token_mean``, by their loss tokens, a ratio estimator whose bias falls
    with the number of rollouts (docs/opd.md). A term with several sources adds their counts.

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
        """What the sum over all rows of some sources in the batch's optimizer step is divided by.

        Args:
            batch: One micro-batch of the step, stamped with the step's counts.
            sources: Of a term.

        Raises:
            ConfigError: The batch does not say what is needed.
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

    def _tokens_per_rollout(self, sampled: SampledCounts) -> float:
        if self.by == "running_mean":
            return sampled.mean_tokens
        return float(sampled.max_tokens if self.by == "constant" else self.by)


def step_tokens(batch: DistillBatch) -> tuple[int, ...]:
    """Loss tokens of the batch's whole optimizer step, one number a source.

    Raises:
        ConfigError: The batch does not say.
    """
    if batch.step_counts is None:
        raise ConfigError(
            "a training batch without step_counts: train on a RolloutDataModule's batches, or set "
            "DistillBatch.step_counts to the optimizer step's loss tokens by source"
        )
    return batch.step_counts


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum ``values`` where ``mask`` is True, in float32 or wider.

    Masked-out values may be infinite or NaN: they contribute exactly zero to the sum and zero to
    the gradient (a product with 0 would give NaN). With nothing masked in, the result is a zero
    that is still connected to the graph, so that a rank with nothing to say takes part in the
    backward pass and its collectives.

    Args:
        values: Any shape, nats a token.
        mask: Same shape, boolean, True = contributes.

    Returns:
        Scalar; gradient flows to the masked-in values.
    """
    wide = values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
    return torch.where(mask, wide, torch.zeros_like(wide)).sum()


def loss_output(values: Tensor, mask: Tensor, **metrics: Tensor) -> LossOutput:
    """A term's LossOutput from per-token values (nats) and the mask of the tokens it acts on.

    Args:
        values: [positions] nats, with gradient.
        mask: [positions] True where the term acts.
        **metrics: Further [positions] values, summed over the same mask without gradient.
    """
    return LossOutput(
        sum=masked_sum(values, mask),
        count=mask.sum(),
        metrics={name: masked_sum(value.detach(), mask) for name, value in metrics.items()},
    )


def step_factor(divisor: int | float, accumulate_grad_batches: int, world_size: int) -> float:
    """What a micro-batch's sum is multiplied with: one over the divisor of its whole step.

    Lightning divides every micro-batch's loss by ``accumulate_grad_batches``, and DDP and FSDP
    average gradients over ranks; both are multiplied back here, so that what reaches the optimizer
    is (sum over all tokens of the step) / divisor.

    Args:
        divisor: See ``Normalization``; 0 where the step has no tokens.
        accumulate_grad_batches: Micro-batches an optimizer step.
        world_size: Ranks that gradients are averaged over.
    """
    return accumulate_grad_batches * world_size / (divisor or 1)
