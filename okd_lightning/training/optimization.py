"""The OptimizerBuilder: optimizer, parameter groups and schedules of a run.

Also owns which of these settings a resumed run takes from its own config. ``module`` owns the
losses.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.optim import Optimizer

from okd_lightning.errors import ConfigError
from okd_lightning.losses import Term
from okd_lightning.teachers import OnlineModuleSettings, trained
from okd_lightning.teachers.online_module import ScheduleName, check_schedule
from okd_lightning.training.distilled_run import DistilledRun
from okd_lightning.training.optimizer_settings import check_own_scheduler, optimizer_settings
from okd_lightning.training.optimizers import (
    RateSchedule,
    build_optimizer,
    with_schedule,
    with_scheduler,
)
from okd_lightning.training.resumed_rates import (
    check_optimizer,
    groups_of,
    reapply,
    rebase,
    regroup,
)
from okd_lightning.training.run_settings import plain


@dataclass(frozen=True)
class Optimization:
    """The optimizer settings of a DistillationModule; see its arguments.

    Raises:
        ConfigError: A number out of its range, an unknown schedule, or settings that conflict.
    """

    learning_rate: float | None
    weight_decay: float | None
    warmup_steps: int
    schedule: ScheduleName
    optimizer: OptimizerCallable | None
    lr_scheduler: LRSchedulerCallable | None

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Optimization:
        """Return the settings among the arguments of a DistillationModule."""
        return cls(**{field.name: given[field.name] for field in fields(cls)})

    def __post_init__(self) -> None:
        if not (math.isfinite(self.warmup_steps) and self.warmup_steps >= 0):
            raise ConfigError(
                f"model.warmup_steps must be a number from 0 on, got {self.warmup_steps}"
            )
        check_schedule(self.schedule)
        check_own_scheduler(self.lr_scheduler, self.schedule, self.warmup_steps)


class OptimizerBuilder:
    """The optimizer of a run, from its settings to its resume.

    Args:
        given: The user's settings.

    Attributes:
        given: The user's settings.
        settings: Learning rate, weight decay, optimizer and scheduler of the run.
    """

    def __init__(self, given: Optimization) -> None:
        self.given = given
        self.settings = optimizer_settings(
            given.learning_rate, given.weight_decay, given.optimizer, given.lr_scheduler
        )
        self._built_groups: list[dict[str, Any]] = []
        self._resumed: dict[str, Any] | None = None  # a checkpoint's optimizer settings

    def described(self, run: DistilledRun) -> dict[str, Any]:
        """Collect method, optimizer, rates, clipping, precision and device of a run.

        Returns:
            Primitives, and mappings of them.
        """
        own, trainer = self.settings, run.trainer
        settings: dict[str, Any] = {
            "method": {term.name: dict(term.settings) for term in run.terms},
            "optimizer": own.optimizer,
            "learning_rate": own.learning_rate,
            "weight_decay": own.weight_decay,
        }
        if own.has_own_scheduler:
            settings["lr_scheduler"] = {"class": own.scheduler, **own.scheduler_settings}
        else:
            given = self.given
            settings |= {"schedule": given.schedule, "warmup_steps": given.warmup_steps}
        settings |= {
            "gradient_clip_val": trainer.gradient_clip_val,
            "gradient_clip_algorithm": str(trainer.gradient_clip_algorithm or "norm"),
            "accumulate_grad_batches": trainer.accumulate_grad_batches,
            "precision": str(trainer.precision),
            "device": f"{trainer.world_size} x {trainer.strategy.root_device.type}",
        }
        return settings | {k: plain(v) for k, v in run.pair.teacher.settings().items()}

    def build(self, run: DistilledRun) -> OptimizerLRScheduler:
        """Build one optimizer over the student and the online module, each with its schedule."""
        given, teacher, trainer = self.given, run.pair.teacher, run.trainer
        online, online_parameters = teacher.online_module, teacher.trained_parameters()
        optimizer = build_optimizer(
            trained(run.student),
            online_parameters,
            run.learning_rate,
            run.weight_decay,
            online.learning_rate if online is not None else None,
            given.optimizer,
            trained(run.projectors),
        )
        # torch's mark of fused optimizers, with which Lightning refuses to clip in mixed precision;
        # without it a loss scaler unscales before the clipping, as for any optimizer
        vars(optimizer)["_step_supports_amp_scaling"] = False
        if given.lr_scheduler is not None:
            if online is not None:
                named = {"schedule": online.schedule, "warmup_steps": online.warmup_steps}
                check_own_scheduler(given.lr_scheduler, given.schedule, given.warmup_steps, named)
            configured = with_scheduler(optimizer, given.lr_scheduler)
        else:
            configured = with_schedule(
                optimizer,
                RateSchedule(given.schedule, given.warmup_steps),
                lambda: trainer.estimated_stepping_batches,
                None if online is None else self._online_schedule(online, run.terms),
                online_parameters,
            )
        self._built_groups = groups_of(optimizer)
        return configured

    def _online_schedule(self, own: OnlineModuleSettings, terms: Sequence[Term]) -> RateSchedule:
        """Return the online module's schedule; settings that it lacks are the student's."""
        given = self.given
        warmup_steps = given.warmup_steps if own.warmup_steps is None else own.warmup_steps
        option = "model.schedule" if own.schedule is None else "method.schedule"
        window = teaching_window(terms)
        return RateSchedule(own.schedule or given.schedule, warmup_steps, option, *window)

    # ---------------------------------------------------------------- resuming

    def resume(self, checkpoint: dict[str, Any], student: nn.Module | None) -> None:
        """Check that a checkpoint's optimizer is this run's; its settings are applied later.

        Args:
            checkpoint: The checkpoint; groups of an older one are split in place.
            student: The student's model.

        Raises:
            CheckpointError: Another optimizer or scheduler.
        """
        saved = checkpoint["okd_lightning"].get("optimizer")
        check_optimizer(saved, self.settings)
        regroup(checkpoint, trained(student))
        self._resumed = {"settings": saved}

    def start(self, optimizer: Any, scheduler: Any, learning_rate: float) -> None:
        """Apply this run's optimizer settings to the state that a resume has restored, once.

        Lightning restores optimizer and schedule after ``configure_optimizers`` and before
        ``on_train_start``.

        Args:
            optimizer: The run's optimizer; several, of a subclass that steps them itself, are not
                changed.
            scheduler: The run's scheduler.
            learning_rate: The module's, which Lightning's LearningRateFinder sets.
        """
        if not isinstance(optimizer, Optimizer):
            return
        if self._resumed is not None:
            saved = self._resumed["settings"]
            reapply(optimizer, scheduler, self._built_groups, saved, self.settings)
            self._resumed = None
        settings = self.settings
        if learning_rate != settings.learning_rate:
            rebase(optimizer, scheduler, settings.learning_rate, learning_rate)
            self.settings = replace(settings, defaults={**settings.defaults, "lr": learning_rate})


def teaching_window(terms: Sequence[Term]) -> tuple[int, int | None]:
    """Return start and end of the steps that train the online module; end None: the run's end."""
    windows = [term.window for term in terms if term.trains_teacher] or [(0, None)]
    ends = [end for _, end in windows if end is not None]
    return min(start for start, _ in windows), max(ends) if len(ends) == len(windows) else None
