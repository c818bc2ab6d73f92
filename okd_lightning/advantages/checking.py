"""Check of an advantage where a method is constructed, on two rows of three tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from okd_lightning.advantages.base import Advantage
from okd_lightning.divergences.named_classes import as_object
from okd_lightning.errors import ConfigError


def as_advantage(given: object, option: str = "advantage") -> Advantage:
    """Return the argument of a method as a checked advantage.

    Args:
        given: An advantage, an advantage class that needs no arguments, or such a class's name.
        option: Name of the argument, for messages.

    Raises:
        ConfigError: It is none of those, or ``credit`` returns no detached, finite Tensor of the
            shape of the log-probabilities.
    """
    example = "FDivergenceAdvantage(ReverseKL())"
    advantage: Advantage = as_object(given, Advantage, option, example)
    student = torch.tensor([[0.7, 0.2, 0.5], [0.1, 0.9, 0.3]]).log()
    teacher = torch.tensor([[0.4, 0.6, 0.5], [0.3, 0.8, 0.1]]).log()
    mask = torch.tensor([[True, True, False], [True, True, True]])
    value = torch.zeros_like(teacher) if advantage.state_value_of is not None else None
    credit: object = advantage.credit(student, teacher, mask, value)
    name = type(advantage).__name__
    if not isinstance(credit, Tensor) or credit.shape != teacher.shape:
        got = list(credit.shape) if isinstance(credit, Tensor) else type(credit).__name__
        raise ConfigError(
            f"advantage {name}: credit() returned {got} for log-probs of shape "
            f"{list(teacher.shape)}; expected a Tensor of that shape, one advantage per token"
        )
    if credit.requires_grad:
        raise ConfigError(
            f"advantage {name}: the advantage carries a gradient, so that another objective would "
            "be trained; detach it (or decorate credit() with torch.no_grad())"
        )
    if not credit[mask].isfinite().all():
        raise ConfigError(
            f"advantage {name}: it is not finite for an ordinary token ({credit.tolist()})"
        )
    return advantage
