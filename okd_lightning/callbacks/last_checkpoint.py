"""``last.ckpt``: always where the run is, whatever "best" says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info

from okd_lightning.data import RolloutDataModule
from okd_lightning.errors import ConfigError


class LastCheckpoint(Checkpoint):
    """Writes ``checkpoints/last.ckpt`` of the run's folder, atomically, over the one before.

    After every validation, at the end of every epoch and of the run, and every so many optimizer
    steps where that is asked for. (ModelCheckpoint's ``save_last`` follows its monitor: after a
    worse validation its "last" is old.) It is a Checkpoint, which Lightning calls after all other
    callbacks and in the order given: behind "best", so that it holds what "best" has just seen.

    Args:
        every_n_steps: Optimizer steps between two checkpoints, besides those.

    Raises:
        ConfigError: every_n_steps below 1.
    """

    def __init__(self, every_n_steps: int | None = None) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ConfigError(f"every_n_steps must be at least 1, got {every_n_steps}")
        self.every_n_steps = every_n_steps
        self._saved_at = -1

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Save when the interval is full, and behind the last batch of an epoch.

        Not in ``on_train_epoch_end``: where the last validation was in the middle of the epoch,
        Lightning counts the epoch of such a checkpoint twice, and a resumed run ends too early.
        """
        is_due = self.every_n_steps and trainer.global_step % self.every_n_steps == 0
        if (is_due or trainer.is_last_batch) and not _validation_follows(trainer):
            self._save(trainer)

    def on_validation_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Save with the measures of this validation."""
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
        """Say where a run that was stopped can be taken up again."""
        if self._saved_at >= 0:
            rank_zero_info(f"resume: okd-lightning fit --ckpt_path {_path(trainer)}")

    def _save(self, trainer: lightning.Trainer) -> None:
        if (trainer.fit_loop.batch_idx + 1) % trainer.accumulate_grad_batches:
            return  # within an optimizer step: its gradient would be lost
        if trainer.global_step == self._saved_at or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._saved_at = trainer.global_step
        trainer.save_checkpoint(_path(trainer), weights_only=False)


def _validation_follows(trainer: lightning.Trainer) -> bool:
    """Whether this batch's validation is still to come: a run resumed here would skip it."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    if isinstance(data, RolloutDataModule) and data.sources["val"] is None:
        return False
    loop = trainer.fit_loop
    assert loop._data_fetcher is not None
    return bool(loop.epoch_loop._should_check_val_fx(loop._data_fetcher))


def _path(trainer: lightning.Trainer) -> Path:
    return Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt"
