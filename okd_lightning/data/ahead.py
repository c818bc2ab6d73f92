"""Rollouts ahead of training for a run's methods, or the reason why there can be none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from okd_lightning.data.distilled_module import DistilledModule
from okd_lightning.errors import ConfigError
from okd_lightning.rollouts import StagedPlan
from okd_lightning.rollouts.ahead import RolloutsAhead


def rollouts_ahead(
    lag: int,
    module: DistilledModule,
    plan: StagedPlan,
    gather: Callable[[Any], list[Any]],
) -> RolloutsAhead:
    """Return the rollout batches that a run generates ahead of training.

    Args:
        lag: ``data.rollout_lag``.
        module: The module, with the run's terms.
        plan: The sources of rows; without the student's there is nothing to generate ahead.
        gather: Collects one object of every rank, on every rank.

    Raises:
        ConfigError: A method, the data's tools, the engine or the strategy cannot do so.
    """
    if not lag or "student" not in plan.sources:
        return RolloutsAhead(gather=gather)
    for term in module.terms:
        if term.wrap_engine(module) is not module:
            raise ConfigError(
                f"--data.rollout_lag {lag}: method {term.name} ({term.kind}) replays responses or "
                "samples them from a mixture, which cannot be done ahead of training; leave "
                "--data.rollout_lag out"
            )
    if plan.is_varying:
        rank_zero_info(
            f"--data.rollout_lag {lag}: the share of on-policy rows of an optimizer step is chosen "
            f"when its responses are requested; where it follows validation, it acts {lag} rollout "
            "batches later"
        )
    return RolloutsAhead(lag, module.ahead_engine(lag), gather)
