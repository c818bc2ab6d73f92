"""Stop of a run after a checkpoint on SIGTERM or SLURM's warning signal.

Lightning's handlers communicate with other ranks inside the signal handler, at any point of the
program. Here a handler sets a flag, and all ranks check their flags at the same points.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_warn

from okd_lightning.callbacks.monitors.last_checkpoint import (
    LastCheckpoint,
    move_to_end,
)
from okd_lightning.data import RolloutDataModule
from okd_lightning.durable_files import write_json
from okd_lightning.errors import ConfigError, OutputError, PreemptedError
from okd_lightning.rollouts.generation import StopRequest
from okd_lightning.training.lightning_privates import cluster_environment, started_ranks
from okd_lightning.training.loop_state import STOPPED, validation_follows, validation_is_due
from okd_lightning.training.run_records import STOPPED_FILE


class Preemption(Checkpoint):
    """Ends a run that gets SIGTERM after a checkpoint of a complete optimizer step, on all ranks.

    A running step is finished first. A running generation or validation is abandoned; the resumed
    run generates again, or begins with that validation. One rank with the signal is enough. If
    SLURM requeues (``#SBATCH --requeue --signal=SIGUSR1@60``), its warning signal does the same and
    ``scontrol requeue`` requeues the job. SIGTERM does not requeue, because ``scancel`` sends it
    too.

    The checkpoint is that of the Trainer's ``LastCheckpoint``. ``stopped.json`` in the run's folder
    records the stop, for launchers that change a process's exit status (torchrun): the signal, the
    step, the checkpoint and the command that resumes. It is deleted when training continues.

    Args:
        grace_seconds: Seconds after the signal in which the checkpoint may wait for rollout batches
            that are generated ahead of training (``data.rollout_lag``). Those that come later are
            discarded, and the resumed run generates them with other weights.

    Raises:
        ConfigError: grace_seconds is negative.
    """

    def __init__(self, grace_seconds: float = 20.0) -> None:
        if not grace_seconds >= 0:
            raise ConfigError(
                f"Preemption: grace_seconds must be a number from 0 on, got {grace_seconds}"
            )
        self.grace_seconds = grace_seconds
        self._request = StopRequest()
        self._is_agreed = False
        self._is_saved = False
        self._has_saved_early = False  # at a step at which LastCheckpoint had not
        self._is_validating = False
        self._is_due = False  # a resumed run's validation, before which it may generate
        self._has_to_requeue = False
        self._signal = 0  # number of the received signal; 0 on ranks without one
        self._handlers: dict[int, Any] = {}

    def setup(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str
    ) -> None:
        """Move this callback after all others, which have then finished their work on a step."""
        move_to_end(trainer, Preemption)
        self._is_due = False

    # ---------------------------------------------------------------- signals

    def on_sanity_check_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Install the handlers, in place of Lightning's."""
        self._start(trainer)

    def on_train_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Install the handlers, if there was no sanity check."""
        if not self._handlers:
            self._start(trainer)

    def _start(self, trainer: lightning.Trainer) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        self._request = data.stop if isinstance(data, RolloutDataModule) else StopRequest()
        self._is_agreed = self._is_saved = self._is_validating = False
        self._has_saved_early = False
        self._request.is_made = self._has_to_requeue = False
        self._request.deadline, self._request.can_come = None, True
        self._signal = 0
        if trainer.is_global_zero:
            _record_of(trainer).unlink(missing_ok=True)
        if threading.current_thread() is not threading.main_thread():
            return
        self._listen(signal.SIGTERM, self._on_sigterm(trainer))
        environment = cluster_environment(trainer)
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            self._listen(environment.requeue_signal or signal.SIGUSR1, self._on_warning)

    def _listen(self, number: int, handler: Callable[[int, Any], None]) -> None:
        self._handlers[number] = signal.getsignal(number)
        signal.signal(number, handler)

    def _on_sigterm(self, trainer: lightning.Trainer) -> Callable[[int, Any], None]:
        def handle(number: int, frame: Any) -> None:
            del frame
            launcher = started_ranks(trainer)
            if not self._request.is_made and launcher is not None:
                launcher.kill(signal.Signals(number))
            self._signal = number
            self._begin_grace()
            self._request.is_made = True

        return handle

    def _on_warning(self, number: int, frame: Any) -> None:
        del frame
        self._signal = number
        self._begin_grace()
        self._request.is_made = self._has_to_requeue = True

    def _begin_grace(self) -> None:
        """Set the deadline, once; a rank without the signal sets it when the ranks agree."""
        if self._request.deadline is None:
            self._request.deadline = time.monotonic() + self.grace_seconds

    def on_train_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Restore the previous handlers.

        Where a run was stopped at its last step, LastCheckpoint would have saved only now, after
        what other callbacks do at a run's end, and does so.
        """
        self._stop_listening()
        if self._has_saved_early:
            self._is_agreed = False
            self._save(trainer)

    def _stop_listening(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._handlers = {}

    # ---------------------------------------------------------------- where ranks agree

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Ask all ranks for a stop request after every optimizer step, and save if there is one."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0 and self._agree(trainer):
            self._is_validating = validation_follows(trainer)
            saver = _saver(trainer)
            self._has_saved_early = saver is not None and saver.saved_at != trainer.global_step
            self._save(trainer)

    def on_train_batch_start(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Stop before the next step; its batch will be fetched again.

        Raises:
            PreemptedError: A stop was agreed.
        """
        if self._is_agreed:
            raise self._stopped(trainer)

    def on_validation_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Stop before a validation.

        Raises:
            PreemptedError: A stop was agreed.
        """
        self._is_validating = trainer.state.fn == "fit" and not trainer.sanity_checking
        if self._is_agreed and self._is_validating:
            raise self._stopped(trainer)

    def on_validation_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Stop within a validation.

        Raises:
            PreemptedError: A rank was requested to stop.
        """
        if self._is_validating and self._agree(trainer):
            raise self._stopped(trainer)

    def on_validation_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Record that the validation is finished."""
        self._is_validating = self._is_due = False

    def _agree(self, trainer: lightning.Trainer) -> bool:
        """Return whether any rank was requested to stop."""
        is_made = self._request.is_made
        if trainer.world_size > 1:
            mark = torch.tensor(float(is_made), device=trainer.strategy.root_device)
            is_made = bool(trainer.strategy.reduce(mark, reduce_op="sum") > 0)
        self._is_agreed = self._request.is_made = self._is_agreed or is_made
        if self._is_agreed:
            self._begin_grace()
        return self._is_agreed

    def _save(self, trainer: lightning.Trainer) -> None:
        saver = _saver(trainer)
        if saver is not None and trainer.global_step:
            saver.save_now(trainer)
            self._is_saved = True

    # ---------------------------------------------------------------- stopping

    def on_save_checkpoint(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        checkpoint: dict[str, Any],
    ) -> None:
        """Record a validation that is due, which Lightning would consider finished."""
        if self._is_agreed:
            checkpoint[STOPPED] = {"validation_is_due": self._is_validating or self._is_due}

    def on_load_checkpoint(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        checkpoint: dict[str, Any],
    ) -> None:
        """Restore whether a validation is due."""
        self._is_due = validation_is_due(checkpoint)

    def on_exception(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        exception: BaseException,
    ) -> None:
        """Save if the stop came during generation or validation."""
        self._stop_listening()
        if not isinstance(exception, PreemptedError):
            return
        self._is_agreed = True
        self._begin_grace()
        if not self._is_saved:
            self._save(trainer)
        exception.args = (self._message(trainer),)
        self._leave_record(trainer)
        if self._has_to_requeue and trainer.is_global_zero:
            _requeue()

    def _leave_record(self, trainer: lightning.Trainer) -> None:
        """Write ``stopped.json``; all ranks call this, because any of them may have the signal."""
        mark = torch.tensor(float(self._signal), device=trainer.strategy.root_device)
        number = int(trainer.strategy.reduce(mark, reduce_op="max"))
        saver = _saver(trainer)
        path = resume = None
        if saver is not None and self._is_saved:
            path = str(saver.shown_path)
            resume = saver.resume_command(trainer).removeprefix("resume: ")
        if trainer.is_global_zero:
            record = {
                "signal": signal.Signals(number).name if number else None,
                "step": trainer.global_step,
                "checkpoint": path,
                "resume": resume,
            }
            place = _record_of(trainer)
            try:
                place.parent.mkdir(parents=True, exist_ok=True)
                write_json(place, record)
            except (OSError, OutputError) as error:  # the stop itself must not fail
                rank_zero_warn(f"no {STOPPED_FILE} is left: {error}")

    def _stopped(self, trainer: lightning.Trainer) -> PreemptedError:
        return PreemptedError(f"the run was asked to stop at step {trainer.global_step}")

    def _message(self, trainer: lightning.Trainer) -> str:
        asked = f"stopped by a signal at step {trainer.global_step}"
        saver = _saver(trainer)
        if saver is None:
            return f"{asked}; this run keeps no checkpoints (no LastCheckpoint), so that it is lost"
        if not self._is_saved:
            return f"{asked}, before there was anything to save; start it again"
        return f"{asked}; {saver.resume_command(trainer)}"


def _record_of(trainer: lightning.Trainer) -> Path:
    return Path(trainer.default_root_dir) / STOPPED_FILE


def _saver(trainer: lightning.Trainer) -> LastCheckpoint | None:
    found = [c for c in trainer.callbacks if isinstance(c, LastCheckpoint)]  # type: ignore[attr-defined]
    return found[0] if found else None


def _requeue() -> None:
    """Requeue the job in SLURM."""
    job = os.environ.get("SLURM_JOB_ID", "")
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        rank_zero_warn(f"SLURM did not requeue job {job} ({error}); submit it again by hand")
