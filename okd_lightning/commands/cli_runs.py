"""Training from the command line: lock, files and checkpoint around ``Trainer.fit``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import yaml

from okd_lightning.callbacks import LastCheckpoint
from okd_lightning.checkpoints.files import read_checkpoint
from okd_lightning.checkpoints.folder_lock import folder_lock
from okd_lightning.commands.cli_arguments import LAST, class_name, last_checkpoint
from okd_lightning.commands.default_folder import find_run, new_folder
from okd_lightning.commands.resume_rules import check_resume
from okd_lightning.commands.run_folder import CONFIG_FILE, resume_run, start_run
from okd_lightning.commands.saved_config import config_of
from okd_lightning.durable_files import require_writable, write_whole
from okd_lightning.training.loop_state import validation_is_due


def choose_folder(config: Any, settings: dict[str, Any]) -> list[str]:
    """Choose the run's folder where none is given; ``last`` finds a run with the same settings.

    Args:
        config: The command's config; its trainer.default_root_dir and ckpt_path are set.
        settings: All settings, as sections.

    Returns:
        Words that say where the run is resumed; none for a new run.

    Raises:
        CheckpointError: Several runs match.
    """
    folder = find_run(settings) if config.get("ckpt_path") == LAST else None
    if config.get("ckpt_path") == LAST:
        config.ckpt_path = None if folder is None else last_checkpoint("fit", folder)
    name = class_name(config.method and config.method.class_path) or "run"
    config.trainer.default_root_dir = new_folder(name) if folder is None else str(folder)
    return [] if folder is None else ["--ckpt_path", str(config.ckpt_path)]


def train_in_folder(trainer: lightning.Trainer, run_config: str, **kwargs: Any) -> None:
    """Train in the run's folder, as its only run; rank 0 calls this for all ranks.

    A new run moves an older run away, a resumed run appends. A run that fails before its first step
    restores the folder.

    Args:
        trainer: The run's Trainer.
        run_config: All settings of the run, as YAML.
        kwargs: Arguments of ``Trainer.fit``.

    Raises:
        FolderInUseError: Another run writes there.
        OutputError: The folder cannot be written.
        CheckpointError: The checkpoint cannot be read, or the options do not fit it.
    """
    option = "--trainer.default_root_dir"
    folder = Path(trainer.default_root_dir)
    require_writable(folder, option)
    with folder_lock(folder, f"{option} {str(folder)!r}") as hold:
        path = kwargs.get("ckpt_path")
        start = 0
        if path is not None:
            checkpoint = read_checkpoint(path)
            if (saved := config_of(path, checkpoint)) is not None:
                check_resume(saved, yaml.safe_load(run_config), path)
            start, row = int(checkpoint["global_step"]), checkpoint["okd_lightning"].get("row")
            prepared = resume_run(folder, start, row, validation_is_due(checkpoint))
        else:
            prepared = start_run(folder)
        try:
            write_whole(folder / CONFIG_FILE, run_config)
            trainer.fit(**kwargs)
        except BaseException:
            if trainer.global_step <= start and not _has_saved(trainer):
                prepared.withdraw()
            else:
                hold.has_begun = True
            raise


def _has_saved(trainer: lightning.Trainer) -> bool:
    """Return whether this run has written a checkpoint; its rows are then kept, even at step 0."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return any(isinstance(c, LastCheckpoint) and c.has_saved for c in callbacks)
