"""Standard deviation of logits over the vocabulary; 0 for a flat distribution."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from okd_lightning.losses import ModelRole, Quantity, Tile
from okd_lightning.records.shapes import PositionValues


def logit_std(logprobs: Tensor) -> Tensor:
    """Return the population standard deviation of each row's logits.

    Log-probabilities are logits minus one number per row, which does not change the deviation.

    Args:
        logprobs: [positions, vocab] nats; ids at minus infinity do not exist and do not count.

    Returns:
        [positions]; gradient flows to ``logprobs``.
    """
    exists = logprobs > float("-inf")
    count = exists.sum(-1, keepdim=True)
    mean = torch.where(exists, logprobs, 0).sum(-1, keepdim=True) / count
    deviation = torch.where(exists, logprobs - mean, 0)
    return (deviation.square().sum(-1) / count.squeeze(-1)).sqrt()


@dataclass(frozen=True)
class LogitStd(Quantity):
    """Standard deviation of one model's logits over the vocabulary, without gradient."""

    role: ModelRole = "student"

    @property
    def needs_teacher(self) -> bool:  # type: ignore[override]
        """True for the teacher's only."""
        return self.role == "teacher"

    def measure(self, tile: Tile) -> PositionValues:
        """Return [positions], at least 0."""
        return logit_std(tile.logprobs(self.role).detach())
