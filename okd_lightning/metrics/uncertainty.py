"""UNC: one minus the probability of the target token, by difficulty.

arXiv 2409.12512, Eq. 4. Owns the arithmetic on probabilities of responses; knows no model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

DIFFICULTIES = ("easy", "medium", "hard")
"""Thirds of the responses by the teacher's uncertainty, from the lowest."""


def response_uncertainty(target_logprobs: Tensor, row: Tensor, num_rows: int) -> Tensor:
    """Return UNC of each response: the token mean of 1 - softmax probability of the target.

    Args:
        target_logprobs: [positions] nats.
        row: [positions] index of each position's response.
        num_rows: Number of responses.

    Returns:
        [num_rows] in [0, 1]; NaN for a response without a position. No gradient.
    """
    uncertainty = 1 - target_logprobs.detach().double().exp()
    zeros = torch.zeros(num_rows, dtype=torch.float64, device=row.device)
    total = zeros.index_add(0, row, uncertainty)
    return total / zeros.index_add(0, row, torch.ones_like(uncertainty))


def by_difficulty(values: Tensor, difficulty: Tensor) -> dict[str, Tensor]:
    """Return the means of ``values`` in the easy, the medium and the hard third of the responses.

    Args:
        values: [rows].
        difficulty: [rows]; rows are ranked by it, ties in their given order.

    Returns:
        Scalars; NaN for a third without a row.
    """
    order = torch.argsort(difficulty, stable=True)
    thirds = torch.tensor_split(values[order], len(DIFFICULTIES))
    return {name: third.mean() for name, third in zip(DIFFICULTIES, thirds, strict=True)}


class Uncertainty(Metric):
    """The student's UNC over all responses, and over thirds by the teacher's UNC.

    ``compute`` returns "all", "easy", "medium" and "hard": means over responses.
    """

    full_state_update = False
    higher_is_better = False
    is_differentiable = False
    student: list[Tensor]
    teacher: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("student", [], dist_reduce_fx="cat")
        self.add_state("teacher", [], dist_reduce_fx="cat")

    def update(self, student: Tensor, teacher: Tensor) -> None:
        """Add UNC of some responses under both models, [rows] each."""
        self.student.append(student)
        self.teacher.append(teacher)

    def compute(self) -> dict[str, Tensor]:
        """Return the means over all responses so far."""
        student, teacher = (
            values if isinstance(values, Tensor) else torch.cat(values)
            for values in (self.student, self.teacher)
        )
        return {"all": student.mean(), **by_difficulty(student, teacher)}
