"""Learning-rate schedules, as pure functions from optimizer step to factor.

The module connects them to the optimizer.
"""

from __future__ import annotations

import math
from typing import Literal, TypeAlias, get_args

from okd_lightning.errors import ConfigError

ScheduleName: TypeAlias = Literal["constant", "linear", "cosine"]


def check_schedule(name: str, option: str = "model.schedule") -> None:
    """Refuse an unknown schedule.

    Raises:
        ConfigError: The name is unknown; the message lists the schedules.
    """
    if name not in get_args(ScheduleName):
        raise ConfigError(
            f"{option} is {name!r}; expected one of {', '.join(get_args(ScheduleName))}"
        )


def schedule_factor(name: ScheduleName, step: int, warmup_steps: int, total_steps: float) -> float:
    """Return the factor on the learning rate at ``step``.

    Warm-up rises linearly from 1/warmup_steps to 1. After it the rate is constant, or falls to 0 at
    ``total_steps`` linearly or as half a cosine.

    Args:
        name: "constant", "linear" or "cosine".
        step: Optimizer steps done so far, from 0.
        warmup_steps: Steps of warm-up; 0 for none.
        total_steps: Steps of the whole run.

    Raises:
        ConfigError: An unknown name.
    """
    check_schedule(name)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if name == "constant":
        return 1.0
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    if name == "linear":
        return 1.0 - progress
    return 0.5 * (1.0 + math.cos(math.pi * progress))
