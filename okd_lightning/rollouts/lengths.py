"""The running mean of loss tokens per rollout, from rollout batches that were consumed before.

What a step's sum is divided by must not depend on what the step itself sampled: a sum over sampled
tokens over the number of sampled tokens is a ratio estimator, and biased (docs/opd.md). So rows
that the student sampled are divided by their number times a mean length that earlier rollout
batches have decided.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from okd_lightning.records.batches import SOURCES, SampledCounts

_STUDENT = SOURCES.index("student")

WINDOW_ROLLOUTS = 256
"""About how many earlier rollouts the mean is over; a larger batch counts by itself."""


@dataclass
class RolloutLengths:
    """Decayed sums over earlier rollout batches, and the sums of the one in use.

    A batch of R rollouts lets what was before count W/(W + R), W = ``WINDOW_ROLLOUTS``. All numbers
    come from integer sums over all ranks, in the order in which batches are trained on, so that
    every rank and every resumed run has the same ones.

    Attributes:
        tokens: Loss tokens of earlier batches, decayed.
        rollouts: Their rollouts, decayed.
        own_tokens: Loss tokens of the batch in use.
        own_rollouts: Its rollouts.
        batch: Which batch that is: its epoch, and its first optimizer step in it.
    """

    tokens: float = 0.0
    rollouts: float = 0.0
    own_tokens: int = 0
    own_rollouts: int = 0
    batch: list[int] = field(default_factory=list)

    def begin(self, epoch: int, first_step: int, counts: Tensor) -> None:
        """Use a batch: the one before it becomes an earlier one. Repeated calls change nothing.

        Args:
            epoch: Of the batch.
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
        """What a step's batches say about the student's responses in it.

        Args:
            counts: [2, sources] of the step, as in ``begin``.
            max_tokens: The longest that a response may be.
        """
        return SampledCounts(int(counts[1, _STUDENT]), self.mean, max_tokens)

    @property
    def mean(self) -> float:
        """Loss tokens per rollout of earlier batches; of the first batch its own mean."""
        if self.rollouts and self.tokens:
            return self.tokens / self.rollouts
        return self.own_tokens / self.own_rollouts if self.own_rollouts else 0.0

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {**vars(self), "batch": list(self.batch)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state_dict`` was taken."""
        for name in vars(self):
            setattr(self, name, state[name])
        self.batch = list(state["batch"])
