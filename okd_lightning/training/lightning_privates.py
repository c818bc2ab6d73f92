"""All use of Lightning's private attributes: one function for each thing that has no public access.

A new release of Lightning can change these names without notice; this file is the one to read then.
(The strategy of ``sharding`` subclasses Lightning's, and sets one attribute of its base class.)
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning
from lightning.fabric.plugins.environments import ClusterEnvironment
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher


def will_validate(trainer: lightning.Trainer) -> bool:
    """Return whether Lightning will validate after the current batch."""
    loop = trainer.fit_loop
    assert loop._data_fetcher is not None
    return bool(loop.epoch_loop._should_check_val_fx(loop._data_fetcher))


def set_logged_step(trainer: lightning.Trainer, step: int) -> None:
    """Set the step number that Lightning passes to loggers."""
    trainer.fit_loop.epoch_loop._batches_that_stepped = step


def validation_seconds(trainer: lightning.Trainer) -> float | None:
    """Return ``val_check_interval`` where it is a time, in seconds."""
    return trainer._val_check_time_interval  # type: ignore[attr-defined]


def add_hparams(module: lightning.LightningModule, added: dict[str, Any]) -> None:
    """Add hyper-parameters that Lightning passes to loggers at the start of a fit.

    ``save_hyperparameters`` would read the frame of the constructor, which has returned by then.
    """
    module._set_hparams(added)
    module._hparams_initial = deepcopy(module.hparams)  # type: ignore[assignment]
    module._log_hyperparams = True


def logged_results(trainer: lightning.Trainer) -> list[Any]:
    """Return Lightning's records of the values logged in the current loop."""
    return list((trainer._results or {}).values())


def row_for_loggers(trainer: lightning.Trainer) -> dict[str, Any] | None:
    """Return the values that loggers receive for the current step; None in a step without."""
    connector = trainer._logger_connector
    return connector.metrics["log"] if connector.should_update_logs else None


def uses_distributed_sampler(trainer: lightning.Trainer) -> bool:
    """Return the Trainer's argument ``use_distributed_sampler``."""
    return trainer._accelerator_connector.use_distributed_sampler


def cluster_environment(trainer: lightning.Trainer) -> ClusterEnvironment:
    """Return the environment that started the ranks, such as SLURM's."""
    return trainer._accelerator_connector.cluster_environment


def set_root_dir(trainer: lightning.Trainer, folder: str | Path) -> None:
    """Set ``default_root_dir`` after the Trainer was made."""
    trainer._default_root_dir = folder  # type: ignore[attr-defined]


def started_ranks(trainer: lightning.Trainer) -> _SubprocessScriptLauncher | None:
    """Return the launcher that started the other ranks as scripts and can send them signals."""
    launcher = trainer.strategy.launcher
    return launcher if isinstance(launcher, _SubprocessScriptLauncher) else None
