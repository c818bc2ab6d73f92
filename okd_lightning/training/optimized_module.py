"""The part of the DistillationModule that owns the optimizer.

Owns the optimizer with its parameter groups, the schedules, gradient clipping, and which of these
settings a resumed run takes from its own config. ``module`` owns the losses.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from okd_lightning.errors import ConfigError
from okd_lightning.losses import Term
from okd_lightning.losses.reduction import Normalization
from okd_lightning.models.schedules import ScheduleName, check_schedule
from okd_lightning.training.loop_state import record_hparams
from okd_lightning.training.measured_module import MeasuredModule
from okd_lightning.training.optimizer_settings import (
    OptimizerSettings,
    check_own_scheduler,
    optimizer_settings,
)
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
from okd_lightning.training.step_terms import teaching_window


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

    def __post_init__(self) -> None:
        if not (math.isfinite(self.warmup_steps) and self.warmup_steps >= 0):
            raise ConfigError(
                f"model.warmup_steps must be a number from 0 on, got {self.warmup_steps}"
            )
        check_schedule(self.schedule)
        check_own_scheduler(self.lr_scheduler, self.schedule, self.warmup_steps)

    def settled(self) -> OptimizerSettings:
        """Return learning rate, weight decay, optimizer and scheduler of the run."""
        return optimizer_settings(
            self.learning_rate, self.weight_decay, self.optimizer, self.lr_scheduler
        )


class OptimizedModule(MeasuredModule):
    """Both models of a distillation, with their optimizer.

    Attributes:
        learning_rate: The student's learning rate, before the schedule.
        weight_decay: Weight decay of the student's matrices.
        terms: The methods of the run.
        chosen_options: Command → options that the user chose for it; None in a run from Python.
        normalization: The divisor of sums over on-policy samples.
        run_config: The resolved config as YAML, where the command line made the run.
        started_in: Folder to which the config's relative paths refer.
        measured_before: Values of the last validation before a resume.
        rng_to_restore: Random streams for the first step after a resume.
    """

    normalization: Normalization
    run_config: str | None
    started_in: str | None
    measured_before: dict[str, float]
    rng_to_restore: dict[str, Any] | None

    def __init__(self, optimization: Optimization, *args: Any, **kwargs: Any) -> None:
        settings = optimization.settled()
        super().__init__(*args, **kwargs)
        self.optimizer_settings = settings
        self.learning_rate = settings.learning_rate
        self.weight_decay = settings.weight_decay
        self.warmup_steps = optimization.warmup_steps
        self.schedule = optimization.schedule
        self.optimizer_factory = optimization.optimizer
        self.scheduler_factory = optimization.lr_scheduler
        self.terms: list[Term] = []
        self._checked: list[Term] = []  # terms of the last step
        self._built_groups: list[dict[str, Any]] = []
        self._resumed: dict[str, Any] | None = None  # a checkpoint's optimizer settings
        self.chosen_options: Mapping[str, Mapping[str, Any]] | None = None
        self.run_settings: dict[str, Any] = {}
        self.recorded: list[str] = []  # names of ``run_settings`` that were added to ``hparams``

    def setup(self, stage: str) -> None:
        """Record the run's settings, once all methods are known."""
        super().setup(stage)
        if stage == "fit":
            for name in self.recorded:  # of an earlier fit
                self.hparams.pop(name, None)
            self.run_settings = self.settings_of_run()
            self.recorded = record_hparams(self, self.run_settings)

    def settings_of_run(self) -> dict[str, Any]:
        """Collect method, optimizer, rates, clipping, precision and device of a run.

        Returns:
            Primitives, and mappings of them.
        """
        own = self.optimizer_settings
        settings: dict[str, Any] = {
            "method": {term.name: dict(term.settings) for term in self.terms},
            "optimizer": own.optimizer,
            "learning_rate": own.learning_rate,
            "weight_decay": own.weight_decay,
        }
        if own.has_own_scheduler:
            settings["lr_scheduler"] = {"class": own.scheduler, **own.scheduler_settings}
        else:
            settings |= {"schedule": self.schedule, "warmup_steps": self.warmup_steps}
        settings |= {
            "gradient_clip_val": self.trainer.gradient_clip_val,
            "gradient_clip_algorithm": str(self.trainer.gradient_clip_algorithm or "norm"),
            "accumulate_grad_batches": self.trainer.accumulate_grad_batches,
            "precision": str(self.trainer.precision),
            "device": f"{self.trainer.world_size} x {self.trainer.strategy.root_device.type}",
        }
        return settings | {k: plain(v) for k, v in self.pair.teacher.settings().items()}

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build one optimizer over the student and the online module, each with its schedule."""
        online = self.online_module
        online_parameters = self.pair.teacher.trained_parameters()
        optimizer = build_optimizer(
            self.trained_parameters(self.student),
            online_parameters,
            self.learning_rate,
            self.weight_decay,
            online.learning_rate if online is not None else None,
            self.optimizer_factory,
            self.trained_parameters(self.projectors),
        )
        trainer = self.trainer
        if self.scheduler_factory is not None:
            self._check_online_schedule()
            configured = with_scheduler(optimizer, self.scheduler_factory)
        else:
            configured = with_schedule(
                optimizer,
                RateSchedule(self.schedule, self.warmup_steps),
                lambda: trainer.estimated_stepping_batches,
                self._online_schedule(),
                online_parameters,
            )
        self._built_groups = groups_of(optimizer)
        return configured

    def _online_schedule(self) -> RateSchedule | None:
        """Return the online module's schedule; settings that it lacks are the student's."""
        own = self.online_module
        if own is None:
            return None
        warmup_steps = self.warmup_steps if own.warmup_steps is None else own.warmup_steps
        option = "model.schedule" if own.schedule is None else "method.schedule"
        window = teaching_window(self.terms)
        return RateSchedule(own.schedule or self.schedule, warmup_steps, option, *window)

    def _check_online_schedule(self) -> None:
        if (own := self.online_module) is not None:
            named = {"schedule": own.schedule, "warmup_steps": own.warmup_steps}
            check_own_scheduler(self.scheduler_factory, self.schedule, self.warmup_steps, named)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip student and projectors by the Trainer's value, the online module by its own norm.

        Gradients of an online module or projectors that no method trains in this step are removed:
        the optimizer then skips their weights and moments, and counts no step for them.
        """
        own = self.online_module
        if not any(term.trains_teacher for term in self._checked):
            for parameter in self.pair.teacher.trained_parameters():
                parameter.grad = None
        for parameter in self.idle_projectors(self._checked):
            parameter.grad = None
        if own is not None and own.clip_norm and gradient_clip_algorithm == "value":
            raise ConfigError(
                f"clip_norm {own.clip_norm} of the online module is a norm, and "
                "trainer.gradient_clip_algorithm value clips no norms: leave one of them out"
            )
        if own is None or gradient_clip_algorithm == "value":
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        limits = (gradient_clip_val, own.clip_norm or gradient_clip_val)
        student, teacher = map(self.trained_parameters, (self.student, self.teacher))
        student = [*student, *self.trained_parameters(self.projectors)]
        for parameters, limit in zip((student, teacher), limits, strict=True):
            if limit:
                clip_grad_norm_(parameters, limit)

    # ---------------------------------------------------------------- resuming

    def resume_optimizer(self, checkpoint: dict[str, Any]) -> None:
        """Check that a checkpoint's optimizer is this run's; its settings are applied later.

        Raises:
            CheckpointError: Another optimizer or scheduler.
        """
        saved = checkpoint["okd_lightning"].get("optimizer")
        check_optimizer(saved, self.optimizer_settings)
        regroup(checkpoint, self.trained_parameters(self.student))
        self._resumed = {"settings": saved}

    def on_train_start(self) -> None:
        """Apply this run's optimizer settings to the state that a resume has restored, once.

        Lightning restores optimizer and schedule after ``configure_optimizers`` and before this.
        """
        optimizer, scheduler = self.optimizers(use_pl_optimizer=False), self.lr_schedulers()
        if not isinstance(optimizer, Optimizer):  # several, of a subclass that steps them itself
            return
        if self._resumed is not None:
            saved, own = self._resumed["settings"], self.optimizer_settings
            reapply(optimizer, scheduler, self._built_groups, saved, own)
            self._resumed = None
        settings = self.optimizer_settings
        if self.learning_rate != settings.learning_rate:  # Lightning's LearningRateFinder set it
            rebase(optimizer, scheduler, settings.learning_rate, self.learning_rate)
            defaults = {**settings.defaults, "lr": self.learning_rate}
            self.optimizer_settings = replace(settings, defaults=defaults)
