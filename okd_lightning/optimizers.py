"""The one optimizer of a run: its parameter groups and the schedules of their learning rates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch.nn import Parameter
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from okd_lightning.errors import ConfigError
from okd_lightning.schedules import ScheduleName, schedule_factor


@dataclass(frozen=True)
class RateSchedule:
    """How one side's learning rate goes.

    Attributes:
        name: What happens after warm-up.
        warmup_steps: Optimizer steps of warm-up.
        option: How the user named it, for messages.
        start: Optimizer step at which it begins.
        end: Optimizer step at which it has ended; None for the run's end.
    """

    name: ScheduleName
    warmup_steps: int
    option: str = "model.schedule"
    start: int = 0
    end: int | None = None


def build_optimizer(
    student: Iterable[Parameter],
    online_module: Iterable[Parameter],
    learning_rate: float,
    weight_decay: float,
    online_learning_rate: float | None = None,
    factory: OptimizerCallable | None = None,
) -> Optimizer:
    """AdamW over the trainable parameters of both sides, or what ``factory`` makes of them.

    Args:
        student: Its parameters; frozen ones are left out.
        online_module: The teacher's; only the online module's are trainable, if there is one.
        learning_rate: Of the student, before the schedule.
        weight_decay: On matrices only, not on biases and norms; none on the online module.
        online_learning_rate: Of the online module; None for the student's.
        factory: A full optimizer; brings its own rate and decay for the student.
    """
    trainable = [p for p in student if p.requires_grad]
    own_rate = {} if online_learning_rate is None else {"lr": online_learning_rate}
    online: dict[str, Any] = {
        "params": [p for p in online_module if p.requires_grad],
        "weight_decay": 0.0,
        **own_rate,
    }
    if factory is not None:
        groups: list[dict[str, Any]] = [{"params": trainable}, online]
        return factory([group for group in groups if group["params"]])
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
        online,
    ]
    return AdamW([group for group in groups if group["params"]], lr=learning_rate)


def with_schedule(
    optimizer: Optimizer,
    student: RateSchedule,
    total_steps: Callable[[], float],
    online_module: RateSchedule | None = None,
    online_parameters: Iterable[Parameter] = (),
) -> OptimizerLRScheduler:
    """What ``configure_optimizers`` returns: schedules that advance with optimizer steps.

    Args:
        optimizer: Whose rates are scheduled, each group's by its own side's schedule.
        student: Of the student's groups.
        total_steps: Asked from the first step on and not before: to answer, Lightning loads the
            training data, and if it did so before it has restored a checkpoint's state of them, a
            resumed run would begin them anew.
        online_module: Of the groups of ``online_parameters``; None for the student's.
        online_parameters: What ``optimizer`` trains of the teacher.
    """
    online = {id(parameter) for parameter in online_parameters}

    def factor_of(schedule: RateSchedule) -> Callable[[int], float]:
        def factor(step: int) -> float:
            total = total_steps() if step else math.inf  # the factor of step 0 is the same for all
            total = min(total, schedule.end or math.inf) - schedule.start
            if step and math.isinf(total) and schedule.name != "constant":
                raise ConfigError(
                    f"{schedule.option} {schedule.name} needs to know the run's end: give "
                    "--trainer.max_epochs or --trainer.max_steps, or the schedule constant"
                )
            own_step = max(0, step - schedule.start)
            return schedule_factor(schedule.name, own_step, schedule.warmup_steps, total)

        return factor

    factors = [
        factor_of((online_module or student) if id(group["params"][0]) in online else student)
        for group in optimizer.param_groups
    ]
    return {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": LambdaLR(optimizer, factors), "interval": "step"},
    }
