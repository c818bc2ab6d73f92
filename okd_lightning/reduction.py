"""Masked sums and the one division.

Owns: how per-token values become a scalar, and what a scalar is divided by. Every loss of the
library ends here, so that its gradient does not depend on how a batch was cut into micro-batches,
ranks or chunks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from okd_lightning.records import LossOutput


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


def step_factor(step_count: int, accumulate_grad_batches: int, world_size: int) -> float:
    """What a micro-batch's sum is multiplied with: one over the loss tokens of its whole step.

    Lightning divides every micro-batch's loss by ``accumulate_grad_batches``, and DDP and FSDP
    average gradients over ranks; both are multiplied back here, so that what reaches the optimizer
    is (sum over all tokens of the step) / (number of those tokens).

    Args:
        step_count: Loss tokens of the step over all micro-batches and ranks.
        accumulate_grad_batches: Micro-batches an optimizer step.
        world_size: Ranks that gradients are averaged over.
    """
    return accumulate_grad_batches * world_size / max(1, step_count)
