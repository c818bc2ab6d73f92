"""Optimizer and schedule settings at a resume: those that are applied, and those that are refused.

torch's ``load_state_dict`` restores learning rates, weight decay and every other setting of the
parameter groups together with the moments, so that an option given at a resume would have no
effect. This module restores the settings of the current run, and computes the rates of its schedule
once for the next step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from okd_lightning.errors import CheckpointError
from okd_lightning.training.optimizer_settings import OptimizerSettings

Groups = Sequence[Mapping[str, Any]]


def groups_of(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Return a copy of the settings of every parameter group, before a checkpoint replaces them."""
    return [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]


def check_optimizer(saved: Mapping[str, Any] | None, own: OptimizerSettings) -> None:
    """Refuse to resume with an optimizer or scheduler that is not the checkpoint's.

    Args:
        saved: ``OptimizerSettings.to_dict`` of the checkpoint; None in an older one.
        own: This run's settings.

    Raises:
        CheckpointError: They differ; the message names both.
    """
    if saved is None:
        return
    for option, name in (("optimizer", own.optimizer), ("scheduler", own.scheduler)):
        if saved[option] != name:
            typed = "optimizer" if option == "optimizer" else "lr_scheduler"
            raise CheckpointError(
                f"the checkpoint's {option} is {saved[option]} and this run's is {name}, whose "
                f"state is another: leave --model.{typed} as it was, or start a new run from the "
                "exported student: --model.student FOLDER"
            )
    changed = _changed(saved["scheduler_settings"], own.scheduler_settings)
    changed.pop("base_lrs", None)
    if own.has_own_scheduler and saved["defaults"]["lr"] != own.learning_rate:
        changed["learning_rate"] = own.learning_rate
    if changed:
        raise CheckpointError(
            f"{own.scheduler} continues with its state from the checkpoint, so that another "
            f"{' or '.join(sorted(changed))} would have no effect: leave it as it was, or start a "
            "new "
            "run from the exported student: --model.student FOLDER"
        )


def rebase(optimizer: Optimizer, scheduler: Any, old: float, new: float) -> None:
    """Change the base learning rate of groups and schedule after both were built.

    Args:
        optimizer: Groups at ``old`` are changed; groups with another rate are not.
        scheduler: Its ``LambdaLR``, or a user's, which keeps its own state.
        old: The rate before the schedule, as it was built.
        new: The new rate before the schedule.
    """
    if not isinstance(scheduler, LambdaLR):
        return
    for i, factor in enumerate(scheduler.lr_lambdas):
        group = optimizer.param_groups[i]
        if group["initial_lr"] == old:
            group["initial_lr"] = scheduler.base_lrs[i] = new
        group["lr"] = group["initial_lr"] * factor(scheduler.last_epoch)


def reapply(
    optimizer: Optimizer,
    scheduler: Any,
    configured: Groups,
    saved: Mapping[str, Any] | None,
    own: OptimizerSettings,
) -> None:
    """Apply this run's settings to an optimizer that was restored from a checkpoint.

    Args:
        optimizer: The restored optimizer.
        scheduler: The restored scheduler; rates of a ``LambdaLR`` are computed for its step.
        configured: ``groups_of`` the optimizer as it was built.
        saved: The checkpoint's settings; None in an older one.
        own: This run's settings.

    Raises:
        CheckpointError: Another learning rate of a group that a user's scheduler sets.
    """
    changed = _changed(saved["defaults"], own.defaults) if saved else {}
    for group, built in zip(optimizer.param_groups, configured, strict=True):
        group["name"] = built["name"]
        if "weight_decay" in built:
            group["weight_decay"] = built["weight_decay"]
        group.update({k: v for k, v in changed.items() if k not in ("lr", "weight_decay")})
        if not own.has_own_scheduler:
            group["initial_lr"] = built["initial_lr"]
        elif group["initial_lr"] != built["initial_lr"]:
            raise CheckpointError(
                f"{own.scheduler} continues with its state from the checkpoint, so that the "
                f"learning rate {built['initial_lr']:g} of {built['name']} would have no effect: "
                f"leave it at {group['initial_lr']:g}, or start a new run from the exported student"
            )
    if isinstance(scheduler, LambdaLR) and not own.has_own_scheduler:
        scheduler.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
        step = scheduler.last_epoch
        for group, factor in zip(optimizer.param_groups, scheduler.lr_lambdas, strict=True):
            group["lr"] = group["initial_lr"] * factor(step)
        # private: what get_last_lr returns
        scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]


def regroup(checkpoint: dict[str, Any], student: Sequence[Parameter]) -> None:
    """Split the student's one group of an older checkpoint into decay and no decay, in place.

    Older checkpoints have one group for all of the student's parameters with a user's optimizer.
    The moments keep their numbers; the new groups list them in the order of the parameters.
    """
    (state, *_) = checkpoint.get("optimizer_states") or [{}]
    groups = state.get("param_groups") or [{"name": ""}]
    flat = [i for i, p in enumerate(student) if p.ndim < 2]
    is_whole = len(groups[0].get("params", ())) == len(student)
    if "name" in groups[0] or not is_whole or not 0 < len(flat) < len(student):
        return
    numbers = groups[0]["params"]
    split = [[n for i, n in enumerate(numbers) if (i in set(flat)) is has] for has in (False, True)]
    state["param_groups"] = [*({**groups[0], "params": part} for part in split), *groups[1:]]
    for scheduler in checkpoint.get("lr_schedulers") or ():
        for name in ("base_lrs", "_last_lr", "lr_lambdas"):
            if name in scheduler:
                scheduler[name] = [scheduler[name][0], *scheduler[name]]


def _changed(saved: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return the differing settings with this run's values; tuples and lists compare equal."""
    return {k: v for k, v in own.items() if k in saved and _plain(saved[k]) != _plain(v)}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
