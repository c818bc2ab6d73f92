"""Default run folder: a new folder per run, which is found again by the run's settings.

The folder is ``runs/METHOD-DATE-TIME-XXXX`` below the current folder. ``--ckpt_path last`` finds
the newest run there with the same settings.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning
import yaml
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn

from okd_lightning.checkpoints.folder_lock import HOLDER_FILE
from okd_lightning.commands.run_folder import CONFIG_FILE
from okd_lightning.errors import CheckpointError
from okd_lightning.training.lightning_privates import set_root_dir

RUNS = Path("runs")
_MOST_NAMES = 8


def new_folder(name: str) -> str:
    """Return a name for a new run's folder that no other run takes, even in the same second.

    Args:
        name: Beginning of the name: the method's class.
    """
    moment = time.strftime("%Y%m%d-%H%M%S")
    return str(RUNS / f"{name}-{moment}-{secrets.token_hex(2)}")


def find_run(config: Mapping[str, Any]) -> Path | None:
    """Return the newest run below ``runs/`` with these settings and a checkpoint.

    Args:
        config: All settings of the run; its folder's name is not compared.

    Returns:
        The run's folder; None where there is none, and a new run begins.

    Raises:
        CheckpointError: Several runs of these settings have not ended by themselves, so the choice
            is ambiguous.
    """
    wanted = _without_folder(config)
    found = [folder for folder in _runs() if _without_folder(_config_of(folder)) == wanted]
    waiting = [folder for folder in found if (folder / HOLDER_FILE).is_file()]
    if len(waiting) > 1:
        raise CheckpointError(
            "--ckpt_path last: several runs of these settings can be resumed: "
            f"{_names(waiting)}; give --trainer.default_root_dir one of them"
        )
    return found[0] if found else None


def only_run() -> Path | None:
    """Return the run below ``runs/`` that has a checkpoint, for a command that names no settings.

    Raises:
        CheckpointError: There are several.
    """
    found = _runs()
    if len(found) > 1:
        raise CheckpointError(
            f"--ckpt_path last: there are several runs: {_names(found)}; give "
            "--trainer.default_root_dir one of them, or --ckpt_path a file"
        )
    return found[0] if found else None


class SharedFolder(Callback):
    """Callback that makes all ranks write to rank 0's folder: each process chose its own."""

    def setup(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str
    ) -> None:
        """Take rank 0's folder, before the Trainer's folder is read."""
        folder = trainer.strategy.broadcast(trainer.default_root_dir)
        set_root_dir(trainer, folder)


def _runs() -> list[Path]:
    """Return the folders below ``runs/`` that hold a checkpoint, the newest first."""
    if not RUNS.is_dir():
        return []
    ages = {}
    for folder in RUNS.iterdir():
        times = [path.stat().st_mtime for path in (folder / "checkpoints").glob("*.ckpt*")]
        if times:
            ages[folder] = max(times)
    return sorted(ages, key=lambda folder: -ages[folder])


def _config_of(folder: Path) -> dict[str, Any]:
    """Return a run's settings; empty, with a warning, where they cannot be read."""
    path = folder / CONFIG_FILE
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it holds no settings")
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        problem = " ".join(str(error).split())
        rank_zero_warn(f"{path} cannot be read ({problem}): --ckpt_path last does not see this run")
        return {}
    return config


def _without_folder(config: Mapping[str, Any]) -> dict[str, Any]:
    trainer = config.get("trainer")
    own = {} if not isinstance(trainer, Mapping) else trainer
    return {**config, "trainer": {k: v for k, v in own.items() if k != "default_root_dir"}}


def _names(folders: list[Path]) -> str:
    more = len(folders) - _MOST_NAMES
    shown = ", ".join(map(str, folders[:_MOST_NAMES]))
    return f"{shown} and {more} more" if more > 0 else shown
