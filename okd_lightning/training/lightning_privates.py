"""All use of Lightning's private attributes: one function for each thing that has no public access.

Among them are the numbers of an optimizer step: its number for loggers, which Lightning counts
twice after a resume, and its logged values. Lightning writes the last known value of every metric
into each row until the epoch ends: a metric that is logged only in some steps (a rollout's length,
a stage's loss) would seem constant.

A new release of Lightning can change these names without notice; this file is the one to read then.
(The strategy of ``sharding`` subclasses Lightning's, and sets one attribute of its base class.)
"""

from __future__ import annotations

import os
import signal
from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning
from lightning.fabric.plugins.environments import ClusterEnvironment
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from okd_lightning.errors import ConfigError

_HOOK_BEFORE = "on_train_batch_start"


def will_validate(trainer: lightning.Trainer) -> bool:
    """Return whether Lightning will validate after the current batch."""
    loop = trainer.fit_loop
    assert loop._data_fetcher is not None
    return bool(loop.epoch_loop._should_check_val_fx(loop._data_fetcher))


class _HeldFitLoop(_FitLoop):
    """Fit loop of a run with a validation that is still due; see ``hold_open``."""

    @property
    def done(self) -> bool:
        return False


class _HeldEpochLoop(_TrainingEpochLoop):
    """Epoch loop of a run with a validation that is still due; see ``hold_open``."""

    @property
    def done(self) -> bool:
        return False

    def _should_check_val_fx(self, data_fetcher: Any) -> bool:
        return True


def hold_open(trainer: lightning.Trainer) -> None:
    """Keep a resumed run from ending before the validation that its checkpoint left due.

    Lightning looks at the limits of steps and time first: a run that was stopped in the validation
    after its last step would be finished without it. Both loops look their conditions up in their
    class, so that the class is what changes; ``release`` restores it.
    """
    trainer.fit_loop.__class__ = _HeldFitLoop
    trainer.fit_loop.epoch_loop.__class__ = _HeldEpochLoop


def release(trainer: lightning.Trainer) -> None:
    """Let a run that ``hold_open`` keeps open end at its limits."""
    loop: _FitLoop = trainer.fit_loop
    if type(loop) is _HeldFitLoop:
        loop.__class__ = _FitLoop  # type: ignore[assignment]
        loop.epoch_loop.__class__ = _TrainingEpochLoop


def add_hparams(module: lightning.LightningModule, added: dict[str, Any]) -> None:
    """Add hyper-parameters that Lightning passes to loggers at the start of a fit.

    ``save_hyperparameters`` would read the frame of the constructor, which has returned by then.
    """
    module._set_hparams(added)
    module._hparams_initial = deepcopy(module.hparams)  # type: ignore[assignment]
    module._log_hyperparams = True


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


def end_at_sigterm(trainer: lightning.Trainer) -> None:
    """Let SIGTERM end this process, and the ranks that it started, at once and by the signal.

    Call it before ``validate``, ``test`` or ``predict``. Lightning's own handler lets the process
    go on to the end of a batch, which may be minutes of generation away, and exit with status 0.
    The earlier handler is restored when the Trainer has finished.
    """

    def handle(number: int, frame: Any) -> None:
        del frame
        launcher = started_ranks(trainer)
        if launcher is not None:
            launcher.kill(signal.Signals(number))
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    connector = trainer._signal_connector

    def register() -> None:
        connector._original_handlers = connector._get_current_signal_handlers()
        connector._register_signal(signal.SIGTERM, handle)

    connector.register_signal_handlers = register  # type: ignore[method-assign]


def trainer_of(module: lightning.LightningModule) -> lightning.Trainer | None:
    """Return the module's Trainer; None outside of one."""
    return module._trainer


def is_compiled(module: lightning.LightningModule) -> bool:
    """Return whether torch.compile wraps the module."""
    return module._compiler_ctx is not None or module._compiled_call_impl is not None


def count_steps(trainer: lightning.Trainer, num_done: int) -> None:
    """Set the step that Lightning's loggers use; Lightning counts resumed steps twice."""
    trainer.fit_loop.epoch_loop._batches_that_stepped = num_done


def begin_step(trainer: lightning.Trainer) -> None:
    """Prepare an optimizer step: its logged number and values; validation after whole steps.

    Lightning's own interval is in micro-batches: a checkpoint of a validation within a step would
    lack the gradient of the step's first micro-batches.

    Raises:
        ConfigError: An interval of time, which can end within a step.
    """
    forget_last_step(trainer)
    count_steps(trainer, trainer.global_step)
    accumulate = trainer.accumulate_grad_batches
    seconds = trainer._val_check_time_interval  # type: ignore[attr-defined]
    if accumulate > 1 and seconds is not None:
        raise ConfigError(
            f"trainer.val_check_interval of {seconds:g} seconds would validate within an optimizer "
            f"step of {accumulate} micro-batches; give a number of optimizer steps"
        )
    if isinstance(trainer.val_check_batch, int):
        whole = -(-trainer.val_check_batch // accumulate) * accumulate
        is_in_epochs = trainer.check_val_every_n_epoch is not None
        # the last step of an epoch can be short (limit_train_batches, fast_dev_run)
        trainer.val_check_batch = (
            min(whole, int(trainer.num_training_batches)) if is_in_epochs else whole
        )


def forget_last_step(trainer: lightning.Trainer) -> None:
    """Omit the last step's values from later rows; for ``on_train_batch_start``.

    Epoch means and metric objects continue; ``trainer.callback_metrics`` keeps its values.
    """
    for metric in (trainer._results or {}).values():
        meta = metric.meta
        if meta.on_step and not meta.on_epoch and metric.is_tensor and meta.fx != _HOOK_BEFORE:
            metric.reset()


def unlogged_row(trainer: lightning.Trainer) -> dict[str, float] | None:
    """Return the row of the step that was just done, if its loggers have not received it yet.

    Returns:
        Values by name, with epoch and step; None outside ``on_train_batch_end``, or where this step
        is not logged.
    """
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    is_open = progress.completed < progress.processed
    connector = trainer._logger_connector
    if not is_open or trainer.validating or not connector.should_update_logs:
        return None
    values = {name: float(value) for name, value in connector.metrics["log"].items()}
    return {**values, "epoch": trainer.current_epoch, "step": trainer.global_step - 1}
