"""``last.ckpt``: the latest state of the run, independent of the best checkpoint."""

from __future__ import annotations

import os
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info

from okd_lightning.checkpoints.files import read_checkpoint
from okd_lightning.checkpoints.folder_lock import folder_lock, is_held_here
from okd_lightning.durable_files import require_writable, sync_file
from okd_lightning.errors import CheckpointError, ConfigError, OutputError
from okd_lightning.training.loop_state import is_last_step, validation_follows

_RECORDS = ("*.csv", "*.jsonl")


class LastCheckpoint(Checkpoint):
    """Writes ``checkpoints/last.ckpt`` of the run's folder, atomically, over the previous one.

    It saves after every validation, at the end of every epoch and of the run, and every
    ``every_n_steps``. (ModelCheckpoint's ``save_last`` follows its monitor: after a worse
    validation its "last" is old.) It is always called after all other callbacks, so that it
    contains the present state of BestCheckpoint.

    Args:
        every_n_steps: Optimizer steps between two further checkpoints.
        keep: Number of checkpoints to keep: the last one, and earlier ones as ``last-step=N.ckpt``.

    Raises:
        ConfigError: every_n_steps or keep below 1.
    """

    def __init__(self, every_n_steps: int | None = None, keep: int = 1) -> None:
        for name, value in (("every_n_steps", every_n_steps), ("keep", keep)):
            if value is not None and value < 1:
                raise ConfigError(f"LastCheckpoint: {name} must be at least 1, got {value}")
        self.every_n_steps = every_n_steps
        self.keep = keep
        self._folder: Path | None = None
        self._lock = ExitStack()
        self._saved_at = -1

    def setup(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str
    ) -> None:
        """Set the absolute folder, and move this callback after all others.

        A checkpoint saved before BestCheckpoint has read a validation would lose that validation on
        resume.

        Raises:
            FolderInUseError: Another run trains in the folder; raised on all ranks.
            OutputError: The folder cannot be written; raised on all ranks.
            ConfigError: The Trainer has two; both would write last.ckpt.
        """
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        if sum(isinstance(callback, LastCheckpoint) for callback in callbacks) > 1:
            raise ConfigError(
                "the Trainer has two LastCheckpoint callbacks, which would both write last.ckpt; "
                "leave one of them out"
            )
        move_to_end(trainer, LastCheckpoint)
        self._folder = Path(trainer.default_root_dir).absolute() / "checkpoints"
        self._saved_at = -1
        if stage == "fit" and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._hold(trainer, self._folder.parent)

    def _hold(self, trainer: lightning.Trainer, folder: Path) -> None:
        """Keep other runs out of the run's folder; the command line has done so before."""
        problem = None
        if trainer.is_global_zero and not is_held_here(folder):
            try:
                require_writable(folder, "default_root_dir")
                self._lock.enter_context(folder_lock(folder, f"default_root_dir {str(folder)!r}"))
            except OutputError as error:
                problem = error
        problem = trainer.strategy.broadcast(problem)
        if problem is not None:
            raise problem

    def teardown(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str
    ) -> None:
        """Let other runs into the folder."""
        self._lock.close()

    @property
    def path(self) -> Path:
        """Path of the last checkpoint; available after ``setup``."""
        assert self._folder is not None
        return self._folder / "last.ckpt"

    @property
    def has_saved(self) -> bool:
        """True if it has written a checkpoint since ``setup``."""
        return self._saved_at >= 0

    @property
    def saved_at(self) -> int:
        """Optimizer steps of its latest checkpoint since ``setup``; -1 without one."""
        return self._saved_at

    @property
    def shown_path(self) -> Path:
        """Path of the last checkpoint, relative to the working folder if possible."""
        return self.path.relative_to(Path.cwd()) if Path.cwd() in self.path.parents else self.path

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Save at the interval, and after the last batch of an epoch, where no validation follows.

        A validation saves at its end. The one after the run's last step follows a checkpoint as
        well: a run that is stopped in it resumes with that validation alone.

        Not in ``on_train_epoch_end``: if the last validation was in the middle of the epoch,
        Lightning counts the epoch of such a checkpoint twice, and a resumed run ends too early.
        """
        is_due = self.every_n_steps and trainer.global_step % self.every_n_steps == 0
        is_due = is_due or trainer.is_last_batch
        if is_last_step(trainer) if validation_follows(trainer) else is_due:
            self._save(trainer)

    def on_validation_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Save with the metrics of this validation."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._saved_at = -1
            self._save(trainer)

    def on_train_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Save at the end of the run."""
        self._save(trainer)

    def on_exception(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        exception: BaseException,
    ) -> None:
        """Log the command that resumes the stopped run."""
        self._lock.close()
        if self.has_saved:
            rank_zero_info(self.resume_command(trainer))

    def resume_command(self, trainer: lightning.Trainer) -> str:
        """Return the command that resumes the run."""
        flag = getattr(trainer.lightning_module, "resume_flag", "")
        return f"resume: okd-lightning fit --ckpt_path {self.shown_path}{flag}"

    def _save(self, trainer: lightning.Trainer) -> None:
        if (trainer.fit_loop.batch_idx + 1) % trainer.accumulate_grad_batches:
            return  # inside an optimizer step: its accumulated gradient would be lost
        if trainer.global_step != self._saved_at:
            self.save_now(trainer)

    def save_now(self, trainer: lightning.Trainer) -> None:
        """Save between two optimizer steps, even if this step is saved; all ranks call this."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if trainer.is_global_zero:
            for pattern in _RECORDS:
                for path in self.path.parent.parent.glob(pattern):
                    sync_file(path)
            if self.keep > 1:
                self._keep_one_more(trainer.global_step)
        trainer.save_checkpoint(self.path, weights_only=False)
        self._saved_at = trainer.global_step
        if trainer.is_global_zero:
            self._drop_oldest()

    def _keep_one_more(self, now: int) -> None:
        """Link the last checkpoint under a second name, so that ``last.ckpt`` always exists.

        Skipped if it is of step ``now`` or later: the run was resumed from before it.
        """
        if not self.path.exists():
            return
        try:
            step = read_checkpoint(str(self.path), has_checks=False)["global_step"]
        except CheckpointError:
            return
        if step < now:
            kept = self.path.with_name(f"last-step={step}.ckpt")
            _remove(kept)
            _name_again(self.path, kept)

    def _drop_oldest(self) -> None:
        """Remove the oldest; keep those of later steps, of a run that was resumed from before."""
        found = {
            int(path.stem.removeprefix("last-step=")): path
            for path in self.path.parent.glob("last-step=*.ckpt")
            if path.stem.removeprefix("last-step=").isdigit()
        }
        before = sorted((step for step in found if step < self._saved_at), reverse=True)
        for step in before[self.keep - 1 :]:
            _remove(found[step])


def _name_again(path: Path, other: Path) -> None:
    """Hard-link a file, or a folder's files, under a second name."""
    if path.is_dir():
        shutil.copytree(path, other, copy_function=_link)
    else:
        _link(path, other)


def _link(path: str | Path, other: str | Path) -> None:
    try:
        os.link(path, other)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, other)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def move_to_end(trainer: lightning.Trainer, kind: type[Checkpoint]) -> None:
    """Move the callbacks of one kind after all others, so that Lightning calls them last."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    trainer.callbacks = sorted(callbacks, key=lambda c: isinstance(c, kind))  # type: ignore[attr-defined]
