"""The running mean of loss tokens per rollout, from earlier rollout batches.

The divisor of a step's sum must not depend on the step's own samples: a sum over sampled tokens
divided by their number is a ratio estimator, and biased (docs/opd.md). The divisor of rows that the
student sampled is therefore their number times the mean length of earlier rollout batches.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from okd_lightning.records.batches import SOURCES, SampledCounts

_STUDENT = SOURCES.index("student")

WINDOW_ROLLOUTS = 256
"""Approximate number of earlier rollouts in the mean; a larger batch dominates it."""


@dataclass
class RolloutLengths:
    """Decayed sums over earlier rollout batches, and the sums of the current one.

    A batch of R rollouts multiplies the earlier sums by W/(W + R), W = ``WINDOW_ROLLOUTS``. All
    numbers come from integer sums over all ranks, in the order of training, so that they are equal
    on every rank and in every resumed run.

    Attributes:
        tokens: Loss tokens of earlier batches, decayed.
        rollouts: Rollouts of earlier batches, decayed.
        own_tokens: Loss tokens of the current batch.
        own_rollouts: Rollouts of the current batch.
        batch: Epoch of the current batch, and its first optimizer step in the epoch.
    """

    tokens: float = 0.0
    rollouts: float = 0.0
    own_tokens: int = 0
    own_rollouts: int = 0
    batch: list[int] = field(default_factory=list)

    def begin(self, epoch: int, first_step: int, counts: Tensor) -> None:
        """Set the current batch; the previous one joins the earlier ones. Repeats change nothing.

        Args:
            epoch: Epoch of the batch.
            first_step: Its first optimizer step in the epoch.
            counts: [2, sources] loss tokens and number of its rows over all ranks
                (``count_by_source``).
        """
        if self.batch != [epoch, first_step]:
            kept = WINDOW_ROLLOUTS / (WINDOW_ROLLOUTS + self.own_rollouts)
            self.tokens = self.tokens * kept + self.own_tokens
            self.rollouts = self.rollouts * kept + self.own_rollouts
            self.batch = [epoch, first_step]
        self.own_tokens, self.own_rollouts = counts[:, _STUDENT].tolist()

    def stamp(self, counts: Tensor, max_tokens: int) -> SampledCounts:
        """Return the counts of the student's responses in a step, for its batches.

        Args:
            counts: [2, sources] of the step, as in ``begin``.
            max_tokens: Longest allowed response, in tokens.
        """
        return SampledCounts(int(counts[1, _STUDENT]), self.mean, max_tokens)

    @property
    def mean(self) -> float:
        """Mean loss tokens per rollout of earlier batches; for the first batch, its own mean."""
        if self.rollouts and self.tokens:
            return self.tokens / self.rollouts
        return self.own_tokens / self.own_rollouts if self.own_rollouts else 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return all fields as plain numbers."""
        return {**vars(self), "batch": list(self.batch)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict``."""
        for name in vars(self):
            setattr(self, name, state[name])
        self.batch = list(state["batch"])
