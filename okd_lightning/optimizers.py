"""The one optimizer of a run: its parameter groups and the schedule of their learning rates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch.nn import Parameter
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from okd_lightning.errors import ConfigError
from okd_lightning.schedules import ScheduleName, schedule_factor


def build_optimizer(
    parameters: Iterable[Parameter],
    learning_rate: float,
    weight_decay: float,
    factory: OptimizerCallable | None = None,
) -> Optimizer:
    """AdamW over the trainable parameters, or what ``factory`` makes of them.

    Args:
        parameters: Of the module; frozen ones are left out.
        learning_rate: Before the schedule.
        weight_decay: On matrices only, not on biases and norms.
        factory: A full optimizer; brings its own rate and decay.
    """
    trainable = [p for p in parameters if p.requires_grad]
    if factory is not None:
        return factory([{"params": trainable}])
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return AdamW([group for group in groups if group["params"]], lr=learning_rate)


def with_schedule(
    optimizer: Optimizer,
    schedule: ScheduleName,
    warmup_steps: int,
    total_steps: Callable[[], float],
) -> OptimizerLRScheduler:
    """What ``configure_optimizers`` returns: the schedule advances with optimizer steps.

    Args:
        optimizer: Whose rates are scheduled.
        schedule: What happens after warm-up.
        warmup_steps: Optimizer steps of warm-up.
        total_steps: Asked from the first step on and not before: to answer, Lightning loads the
            training data, and if it did so before it has restored a checkpoint's state of them, a
            resumed run would begin them anew.
    """

    def factor(step: int) -> float:
        total = total_steps() if step else math.inf  # the factor of step 0 is the same for all
        if step and math.isinf(total) and schedule != "constant":
            raise ConfigError(
                f"model.schedule {schedule} needs to know the run's end: give "
                "--trainer.max_epochs or --trainer.max_steps, or the schedule constant"
            )
        return schedule_factor(schedule, step, warmup_steps, total)

    return {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"},
    }
