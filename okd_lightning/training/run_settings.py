"""Settings of a training run, as one line of text and as values for loggers."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any


def one_line(settings: Mapping[str, Any]) -> str:
    """Return the settings of a run (``OptimizerBuilder.described``) as one line."""
    methods = " + ".join(call_text(values) for values in settings["method"].values())
    optimizer = (
        f"{settings['optimizer']}, learning rate {settings['learning_rate']:g}, weight decay "
        f"{settings['weight_decay']:g}"
    )
    if "lr_scheduler" in settings:
        schedule = call_text(settings["lr_scheduler"])
    else:
        steps = settings["warmup_steps"]
        schedule = f"schedule {settings['schedule']}, warm-up {steps:g} steps"
    clip = "no gradient clipping"
    if settings["gradient_clip_val"]:
        clip = (
            f"gradient clip {settings['gradient_clip_val']:g} "
            f"({settings['gradient_clip_algorithm'].rpartition('.')[2].lower()})"
        )
    parts = [methods, optimizer, schedule, clip, f"precision {settings['precision']}"]
    if "online_module" in settings:
        parts.insert(3, "online module " + _listed(settings["online_module"]))
    return "training: " + "; ".join([*parts, f"on {settings['device']}"])


def plain(value: Any) -> Any:
    """Return a setting as primitives: an object by its class and its non-default fields."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(entry) for entry in value]
    if hasattr(value, "given_arguments"):  # a method nested in a method
        return call_text({"class": type(value).__name__, **value.given_arguments})
    if dataclasses.is_dataclass(value):
        return call_text({"class": type(value).__name__, **_changed(value)})
    return getattr(value, "__name__", type(value).__name__)


def given_arguments(kind: type, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return a constructor's arguments with its defaults, as primitives; {} where they do not fit.

    Args:
        kind: The class.
        args: Positional arguments of the constructor.
        kwargs: Keyword arguments of the constructor.
    """
    try:
        bound = inspect.signature(kind).bind(*args, **kwargs)
    except (TypeError, ValueError):
        return {}
    bound.apply_defaults()
    return {name: plain(value) for name, value in bound.arguments.items() if value is not None}


def _changed(value: Any) -> dict[str, Any]:
    """Return the fields of a dataclass that are not at their defaults."""
    found = {}
    for entry in dataclasses.fields(value):
        now = getattr(value, entry.name)
        default = entry.default
        if entry.default_factory is not dataclasses.MISSING:
            default = entry.default_factory()
        is_given = entry.init and not entry.name.startswith(("peft_", "task_type"))
        if is_given and now is not None and now != default:
            found[entry.name] = plain(now)
    return found


def call_text(values: Mapping[str, Any]) -> str:
    """Format as ``Class(setting=value, ...)``."""
    return f"{values['class']}({_listed({k: v for k, v in values.items() if k != 'class'})})"


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"
        for name, value in values.items()
    )
