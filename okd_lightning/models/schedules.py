"""Step → factor: the learning-rate schedules, as pure functions.

Owns the shapes; the optimizer's hook-up is the module's business. Steps are optimizer steps.
"""

from __future__ import annotations

import math
from typing import Literal, TypeAlias, get_args

from okd_lightning.errors import ConfigError

ScheduleName: TypeAlias = Literal["constant", "linear", "cosine"]


def check_schedule(name: str, option: str = "model.schedule") -> None:
    """Refuse an unknown schedule.

    Raises:
        ConfigError: Naming ``option`` and what there is.
    """
    if name not in get_args(ScheduleName):
        raise ConfigError(
            f"{option} is {name!r}; expected one of {', '.join(get_args(ScheduleName))}"
        )


def schedule_factor(name: ScheduleName, step: int, warmup_steps: int, total_steps: float) -> float:
    """What the learning rate is multiplied by at ``step``.

    Warm-up rises linearly from 1/warmup_steps to 1; after it the rate stays, or falls to 0 at
    ``total_steps`` along a line or half a cosine.

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
