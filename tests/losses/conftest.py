"""Random hidden states and heads, in float64 unless a test says otherwise."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from okd_lightning.losses import Side

NUM_POSITIONS, NUM_IDS, STUDENT_WIDTH, TEACHER_WIDTH = 7, 11, 5, 6


@dataclass
class Pair:
    """Leaf tensors of both sides, and the ids that stand at the positions."""

    student_hidden: Tensor
    teacher_hidden: Tensor
    student_head: nn.Linear
    teacher_head: nn.Linear
    targets: Tensor

    @property
    def student(self) -> Side:
        return Side(self.student_hidden, self.student_head)

    @property
    def teacher(self) -> Side:
        return Side(self.teacher_hidden, self.teacher_head)

    @property
    def leaves(self) -> dict[str, Tensor]:
        return {
            "student_hidden": self.student_hidden,
            "student_head": self.student_head.weight,
            "teacher_hidden": self.teacher_hidden,
            "teacher_head": self.teacher_head.weight,
        }

    def gradients(self, total: Tensor) -> dict[str, Tensor | None]:
        found = torch.autograd.grad(total, list(self.leaves.values()), allow_unused=True)
        return dict(zip(self.leaves, found, strict=True))

    def logits(self) -> tuple[Tensor, Tensor]:
        return (
            self.student_hidden @ self.student_head.weight.T + self.student_head.bias,
            self.teacher_hidden @ self.teacher_head.weight.T + self.teacher_head.bias,
        )


def make_pair(num_positions: int = NUM_POSITIONS, dtype: torch.dtype = torch.float64) -> Pair:
    generator = torch.Generator().manual_seed(11)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    def head(width: int) -> nn.Linear:
        linear = nn.Linear(width, NUM_IDS, dtype=dtype)
        linear.weight.data, linear.bias.data = normal(NUM_IDS, width), normal(NUM_IDS)
        return linear

    return Pair(
        student_hidden=normal(num_positions, STUDENT_WIDTH).requires_grad_(),
        teacher_hidden=normal(num_positions, TEACHER_WIDTH).requires_grad_(),
        student_head=head(STUDENT_WIDTH),
        teacher_head=head(TEACHER_WIDTH),
        targets=torch.randint(NUM_IDS, (num_positions,), generator=generator),
    )


@pytest.fixture
def pair() -> Pair:
    return make_pair()


@pytest.fixture(name="make_pair")
def make_pair_fixture():
    return make_pair
