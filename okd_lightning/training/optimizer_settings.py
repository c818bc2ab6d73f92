"""Optimizer and scheduler of a run, and the precedence between two options for one rate.

``model.learning_rate`` and ``model.weight_decay`` are the defaults of a user's optimizer. Values
set in the optimizer itself override them. Two different given values are refused, except with a
Python function, whose values cannot be distinguished from its class's defaults: the function's
values are used, with a message. The description made here is part of a checkpoint, so that a
resumed run can see changes.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable, ReduceLROnPlateau
from lightning.pytorch.utilities import rank_zero_info
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.lr_scheduler import ReduceLROnPlateau as TorchReduceLROnPlateau

from okd_lightning.errors import ConfigError
from okd_lightning.teachers.online_module import ScheduleName
from okd_lightning.training.optimizers import called

DEFAULT_LEARNING_RATE = 5e-5
DEFAULT_WEIGHT_DECAY = 0.0

_RATES = {"lr": ("learning_rate", DEFAULT_LEARNING_RATE)}
_RATES["weight_decay"] = ("weight_decay", DEFAULT_WEIGHT_DECAY)
_OUR_SCHEDULE = "schedule"


@dataclass(frozen=True)
class OptimizerSettings:
    """An optimizer and its scheduler, as class names and plain values.

    Attributes:
        optimizer: Class name.
        defaults: The optimizer's settings, with the run's learning rate and weight decay.
        scheduler: Class name; "schedule" for ``model.schedule`` with ``model.warmup_steps``.
        scheduler_settings: Settings of a user's scheduler.
    """

    optimizer: str
    defaults: Mapping[str, Any]
    scheduler: str = _OUR_SCHEDULE
    scheduler_settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def learning_rate(self) -> float:
        """The student's learning rate, before the schedule."""
        return float(self.defaults["lr"])

    @property
    def weight_decay(self) -> float:
        """Weight decay of the student's matrices."""
        return float(self.defaults["weight_decay"])

    @property
    def has_own_scheduler(self) -> bool:
        """True where a user's scheduler class sets the learning rate."""
        return self.scheduler != _OUR_SCHEDULE

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as primitives, for a checkpoint."""
        return {
            "optimizer": self.optimizer,
            "defaults": dict(self.defaults),
            "scheduler": self.scheduler,
            "scheduler_settings": dict(self.scheduler_settings),
        }


def optimizer_settings(
    learning_rate: float | None,
    weight_decay: float | None,
    optimizer: OptimizerCallable | None = None,
    scheduler: LRSchedulerCallable | None = None,
) -> OptimizerSettings:
    """Resolve learning rate and weight decay, and describe optimizer and scheduler.

    Args:
        learning_rate: As the user gave it; None where it was not given.
        weight_decay: As the user gave it; None where it was not given.
        optimizer: The user's optimizer; None for AdamW.
        scheduler: The user's scheduler; None for ``model.schedule``.

    Raises:
        ConfigError: Two different values for one quantity, a weight decay that the optimizer does
            not have, or a factory that does not work.
    """
    given = {"lr": learning_rate, "weight_decay": weight_decay}
    for key, value in given.items():
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise ConfigError(f"model.{_RATES[key][0]} must be a number from 0 on, got {value}")
    settled = {k: _RATES[k][1] if value is None else value for k, value in given.items()}
    if optimizer is None:
        probe: Optimizer = AdamW(_probe_groups(), lr=settled["lr"])
    else:
        probe = called(optimizer, _probe_groups())
        for key, value in given.items():
            settled[key] = _settled(key, value, probe, optimizer)
    defaults = {**probe.defaults, **settled}
    plain = {key: value for key, value in defaults.items() if _is_plain(value)}
    name = type(probe).__name__
    if scheduler is None:
        return OptimizerSettings(name, plain)
    own = _probed_scheduler(scheduler, probe)
    settings = {k: v for k, v in own.state_dict().items() if not k.startswith("_") and _is_plain(v)}
    return OptimizerSettings(name, plain, type(own).__name__, settings)


def check_own_scheduler(
    scheduler: LRSchedulerCallable | None,
    schedule: ScheduleName,
    warmup_steps: int,
    method_settings: Mapping[str, Any] | None = None,
) -> None:
    """Refuse settings of ``model.schedule`` together with a user's scheduler.

    Args:
        scheduler: The user's, or None.
        schedule: model.schedule.
        warmup_steps: model.warmup_steps.
        method_settings: The online module's own schedule and warmup_steps.

    Raises:
        ConfigError: There is such a setting; the message names it.
    """
    if scheduler is None:
        return
    others = {"model.schedule": schedule if schedule != "constant" else None}
    others["model.warmup_steps"] = warmup_steps or None  # type: ignore[assignment]
    others.update({f"method.{name}": value for name, value in (method_settings or {}).items()})
    for option, value in others.items():
        if value is not None:
            raise ConfigError(
                f"{option} {value} has no effect with model.lr_scheduler, which decides the "
                "learning rates of all groups: leave one of them out"
            )


def _probe_groups() -> list[dict[str, Any]]:
    """Return two groups of dummy parameters: matrices, as Muon accepts no other shape."""
    return [{"params": [torch.nn.Parameter(torch.zeros(2, 2))]} for _ in range(2)]


def _settled(key: str, given: float | None, probe: Optimizer, factory: OptimizerCallable) -> float:
    """Return the value of a quantity that both the module and the optimizer have a setting for."""
    option, default = _RATES[key]
    if key not in probe.defaults:
        if given:
            raise ConfigError(
                f"model.{option} {given:g}: {type(probe).__name__} has no {key}; leave it out, or "
                "take another model.optimizer"
            )
        return default
    own = probe.defaults[key]
    if own is None or not isinstance(own, (int, float, torch.Tensor)):
        return default if given is None else given
    is_own = _brings(factory, key, float(own), probe)
    is_opaque = not isinstance(factory, (type, functools.partial))
    if given is None:
        return float(own) if is_own or is_opaque else default
    if not is_own or float(own) == given:
        return given
    if is_opaque:  # a function is a complete specification
        rank_zero_info(
            f"the optimizer's own {key} {float(own):g} counts; {option} {given:g} is ignored"
        )
        return float(own)
    raise ConfigError(
        f"model.{option} {given:g} and model.optimizer's own {key} {float(own):g} are two "
        "values for one quantity: leave one of them out"
    )


def _brings(factory: OptimizerCallable, key: str, own: float, probe: Optimizer) -> bool:
    """Return whether a factory sets the value itself, instead of using its class's default."""
    if isinstance(factory, functools.partial):
        return key in factory.keywords
    parameter = inspect.signature(type(probe)).parameters.get(key)
    default = getattr(parameter, "default", None)
    return not isinstance(default, (int, float, torch.Tensor)) or own != float(default)


def _probed_scheduler(
    factory: LRSchedulerCallable, probe: Optimizer
) -> LRScheduler | TorchReduceLROnPlateau:
    try:
        scheduler: Any = factory(probe)
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"model.lr_scheduler cannot be built: {error}") from error
    if isinstance(scheduler, TorchReduceLROnPlateau) and not isinstance(
        scheduler, ReduceLROnPlateau
    ):
        raise ConfigError(
            "model.lr_scheduler: torch's ReduceLROnPlateau has no monitored metric; use "
            "lightning.pytorch.cli.ReduceLROnPlateau with its monitor, such as val/reverse_kl"
        )
    if not isinstance(scheduler, (LRScheduler, TorchReduceLROnPlateau)):
        raise ConfigError(
            f"model.lr_scheduler returned a {type(scheduler).__name__}; expected a scheduler of "
            "torch.optim.lr_scheduler"
        )
    return scheduler


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))
