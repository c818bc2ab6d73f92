"""Atomic writing of checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.plugins import TorchCheckpointIO

from okd_lightning.checkpoints.folders import (
    FolderReadingIO,
    beside,
    make_room,
    put_in_place,
)
from okd_lightning.durable_files import replacing


class DurableCheckpointIO(FolderReadingIO):
    """Atomic checkpoint files: written aside, flushed and renamed; URLs as by Lightning.

    Needs memory for the checkpoint's largest tensor, where Lightning's own needs twice the whole
    file.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Save, also over a sharded folder.

        Raises:
            OutputError: The disk is full, or the folder cannot be written; an earlier checkpoint is
                untouched.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        has_folder = target.is_dir() or beside(target, "new").exists()
        has_folder = has_folder or beside(target, "old").exists()
        written = make_room(target) / target.name if has_folder else target
        with replacing(written) as file:
            torch.save(checkpoint, file)
        if has_folder:
            put_in_place(written, target)
            written.parent.rmdir()


def use_durable_checkpoints(trainer: lightning.Trainer) -> None:
    """Make a Trainer save atomically and load folders, unless the user has set a checkpoint_io."""
    strategy = trainer.strategy
    if type(strategy.checkpoint_io) is TorchCheckpointIO:
        strategy.checkpoint_io = DurableCheckpointIO()
