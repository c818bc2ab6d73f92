"""The optimizer of a run: its parameter groups and their learning-rate schedules.

``optimizer_settings`` decides between two options for one rate; ``training.resumed_rates`` decides
which of these settings a resumed run keeps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable, ReduceLROnPlateau
from lightning.pytorch.utilities.types import OptimizerLRScheduler, OptimizerLRSchedulerConfig
from torch import Tensor
from torch.nn import Parameter
from torch.optim import AdamW, Optimizer, SparseAdam
from torch.optim.lr_scheduler import LambdaLR

from okd_lightning.errors import ConfigError
from okd_lightning.teachers.online_module import ScheduleName


@dataclass(frozen=True)
class RateSchedule:
    """Learning-rate schedule of one side.

    Attributes:
        name: Schedule after warm-up.
        warmup_steps: Optimizer steps of warm-up.
        option: Name of the user's option, for messages.
        start: Optimizer step at which the schedule begins.
        end: Optimizer step at which the schedule has ended; None for the run's end.
    """

    name: ScheduleName
    warmup_steps: int
    option: str = "model.schedule"
    start: int = 0
    end: int | None = None


DECAY, NO_DECAY, ONLINE_MODULE = "student/decay", "student/no_decay", "online_module"
"""Names of the parameter groups: matrices; biases and norms; the teacher's online module."""

_FUSED_DEVICES = {"cpu", "cuda"}
"""Devices on which torch's AdamW has one kernel."""

PROJECTORS = "projectors"
"""Name of the group of projectors between hidden states."""


def float16_refusal(what: str) -> str:
    """Return a message: why float16 weights are not trained, and what to do.

    Args:
        what: Which weights, with an article.
    """
    return (
        f"{what} would be trained in float16 weights, where an optimizer's step leaves the range "
        "(AdamW divides by an epsilon that float16 rounds to 0); give --model.dtype float32 (from "
        'Python dtype="float32", or model.float()), with --trainer.precision 16-mixed to compute '
        "in float16, or train a student_adapter (LoraConfig) on the frozen float16 weights"
    )


def build_optimizer(
    student: Iterable[Parameter],
    online_module: Iterable[Parameter],
    learning_rate: float,
    weight_decay: float,
    online_learning_rate: float | None = None,
    factory: OptimizerCallable | None = None,
    projectors: Iterable[Parameter] = (),
) -> Optimizer:
    """Build AdamW, or the optimizer of ``factory``, over the trainable parameters of both sides.

    AdamW runs as one kernel per parameter where torch has one for the device: each state is read
    once, without a temporary copy.

    The groups are named ``student/decay``, ``student/no_decay`` and ``online_module``; each holds
    its own learning rate and weight decay, so that these apply to any optimizer.

    Args:
        student: The student's parameters; frozen ones are left out.
        online_module: The teacher's parameters; only those of its online module are trainable.
        learning_rate: The student's learning rate, before the schedule.
        weight_decay: Applied to the student's matrices only, not to biases and norms.
        online_learning_rate: The online module's learning rate; None for the student's.
        factory: Builds another optimizer from the groups.
        projectors: Projectors between hidden states: the student's rate, no weight decay.

    Raises:
        ConfigError: ``factory`` cannot be called with parameter groups, or weights to be trained
            are in float16.
    """
    student, online_module = list(student), list(online_module)
    for side, parameters in (("student", student), ("teacher's online module", online_module)):
        if any(p.requires_grad and p.dtype == torch.float16 for p in parameters):
            raise ConfigError(float16_refusal(f"the {side}"))
    trainable = [p for p in student if p.requires_grad]
    online_rate = learning_rate if online_learning_rate is None else online_learning_rate
    groups = (
        (DECAY, [p for p in trainable if p.ndim >= 2], learning_rate, weight_decay),
        (NO_DECAY, [p for p in trainable if p.ndim < 2], learning_rate, 0.0),
        (ONLINE_MODULE, [p for p in online_module if p.requires_grad], online_rate, 0.0),
        (PROJECTORS, list(projectors), learning_rate, 0.0),
    )
    keys = ("name", "params", "lr", "weight_decay")
    filled: list[dict[str, Any]] = [
        dict(zip(keys, group, strict=True)) for group in groups if group[1]
    ]
    if factory is not None:
        return called(factory, filled)
    devices = {p.device.type for group in filled for p in group["params"]}
    # False would also exclude torch's foreach kernels
    return AdamW(filled, fused=devices <= _FUSED_DEVICES or None)


def called(factory: OptimizerCallable, groups: list[dict[str, Any]]) -> Optimizer:
    """Return the optimizer that a user's ``factory`` builds from parameter groups.

    Raises:
        ConfigError: It raises, returns something else, or takes no dense gradients.
    """
    try:
        optimizer: Any = factory(groups)
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ConfigError(
            f"model.optimizer cannot be built from parameter groups ({error}); expected an "
            "optimizer class, or a function from parameter groups to an optimizer"
        ) from error
    if not isinstance(optimizer, Optimizer):
        raise ConfigError(
            f"model.optimizer returned a {type(optimizer).__name__}; expected a torch Optimizer"
        )
    if isinstance(optimizer, SparseAdam):
        raise ConfigError(
            "model.optimizer SparseAdam takes sparse gradients alone, and those of a language "
            "model are dense; use Adam, or leave it out for AdamW"
        )
    return optimizer


def with_scheduler(optimizer: Optimizer, factory: LRSchedulerCallable) -> OptimizerLRScheduler:
    """Return the value of ``configure_optimizers`` for a user's scheduler class.

    The scheduler advances with optimizer steps; ``ReduceLROnPlateau`` at an epoch's end, by its
    monitor.
    """
    scheduler = factory(optimizer)
    config: OptimizerLRSchedulerConfig = {"optimizer": optimizer, "lr_scheduler": {}}  # type: ignore[typeddict-item]
    if isinstance(scheduler, ReduceLROnPlateau):
        config["lr_scheduler"] = {
            "scheduler": scheduler,
            "monitor": scheduler.monitor,
            "interval": "epoch",
        }
    else:
        config["lr_scheduler"] = {"scheduler": scheduler, "interval": "step"}
    return config


def schedule_factor(name: ScheduleName, step: int, warmup_steps: int, total_steps: float) -> float:
    """Return the factor on the learning rate at ``step``.

    Warm-up rises linearly from 1/warmup_steps to 1. After it the rate is constant, or falls to 0 at
    ``total_steps`` linearly or as half a cosine.

    Args:
        name: "constant", "linear" or "cosine".
        step: Optimizer steps done so far, from 0.
        warmup_steps: Steps of warm-up; 0 for none.
        total_steps: Steps of the whole run.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if name == "constant":
        return 1.0
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    if name == "linear":
        return 1.0 - progress
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def with_schedule(
    optimizer: Optimizer,
    student: RateSchedule,
    total_steps: Callable[[], float],
    online_module: RateSchedule | None = None,
    online_parameters: Iterable[Parameter] = (),
) -> OptimizerLRScheduler:
    """Return the value of ``configure_optimizers``: schedules that advance with optimizer steps.

    Args:
        optimizer: Each of its groups gets its own side's schedule.
        student: Schedule of the student's groups.
        total_steps: Called only from the first step on. Lightning loads the training data to return
            it; before Lightning has restored their state from a checkpoint, this would make a
            resumed run start the data from the beginning.
        online_module: Schedule of the groups of ``online_parameters``; None for the student's.
        online_parameters: Trained parameters of the teacher.

    Raises:
        ConfigError: In the first step: a falling schedule in a run without an end.
    """
    online = {id(parameter) for parameter in online_parameters}

    def factor_of(schedule: RateSchedule) -> Callable[[int], float]:
        def factor(step: int) -> float:
            total = total_steps() if step else math.inf  # step 0's factor is independent of it
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
        "lr_scheduler": {"scheduler": _OwnGroupsLR(optimizer, factors), "interval": "step"},
    }


class _OwnGroupsLR(LambdaLR):
    """LambdaLR of the initial groups; a callback that adds a group sets that group's rate.

    Lightning's BackboneFinetuning adds a group for the parameters that it unfreezes, and torch's
    LambdaLR refuses an optimizer with more groups than schedules.
    """

    def get_lr(self) -> list[float | Tensor]:
        """Return the scheduled rates, and the current ones of groups that were added later."""
        own = super().get_lr()
        return [*own, *(group["lr"] for group in self.optimizer.param_groups[len(own) :])]
