"""Reading of checkpoints without a module: existence, origin, contents."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn

from okd_lightning.checkpoints.folders import (
    is_checkpoint_folder,
    read_rest,
    read_weights,
    require_sound,
    settled,
)
from okd_lightning.errors import CheckpointError


def read_checkpoint(
    path: str, with_weights: bool = False, has_checks: bool = True
) -> dict[str, Any]:
    """Load a checkpoint on the CPU, weights-only: a memory-mapped file, or a sharded folder.

    Args:
        path: The file or folder.
        with_weights: Load a folder's weights too; a file always has them.
        has_checks: Compare a file with its checksums, which reads all of it once.

    Raises:
        CheckpointError: It does not exist, is broken or damaged, or is of another program.
    """
    file = settled(Path(path).expanduser())
    if is_checkpoint_folder(file):
        weights = {"state_dict": read_weights(file)} if with_weights else {}
        return {**read_rest(file), **weights}
    if not file.is_file():
        raise CheckpointError(f"--ckpt_path {path!r}: there is no such file{_nearby(file)}")
    if has_checks:
        require_sound(file, path)
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        is_foreign = isinstance(error, pickle.UnpicklingError) and file.stat().st_size > 0
        reason = (
            "holds more than tensors and plain values" if is_foreign else "is cut off or broken"
        )
        raise CheckpointError(
            f"--ckpt_path {path!r} {reason}: no checkpoint of okd-lightning"
            f"{_others(file) or ', which keeps them in checkpoints/ of a run folder'}"
        ) from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("okd_lightning"), dict):
        raise CheckpointError(f"--ckpt_path {path!r} was not written by okd-lightning")
    return checkpoint


def newest_checkpoint(folder: Path) -> str | None:
    """Return the checkpoint to resume: ``last.ckpt``, or the newest readable one if that is broken.

    Args:
        folder: A run's folder.

    Returns:
        Its path; None where there are no checkpoints.

    Raises:
        CheckpointError: There are some, and none can be read.
    """
    names = {path.name.partition(".ckpt")[0] for path in (folder / "checkpoints").glob("*.ckpt*")}
    paths = [folder / "checkpoints" / f"{name}.ckpt" for name in names if name]
    found = sorted((path for path in paths if settled(path).exists()), key=_age)
    problems = []
    for path in found:
        try:
            read_checkpoint(str(path))
        except CheckpointError as error:
            problems.append(error)
            continue
        if problems:
            broken = ", ".join(str(p) for p in found[: len(problems)])
            rank_zero_warn(f"{broken} cannot be read; the run continues from {path}")
        return str(path)
    if problems:
        raise CheckpointError(
            f"--ckpt_path last: none of the checkpoints in {folder / 'checkpoints'} can be read "
            f"({', '.join(path.name for path in found)}); move them away to begin again"
        ) from problems[0]
    return None


def _age(path: Path) -> tuple[bool, float]:
    """Return a sort key: ``last.ckpt`` first, then from new to old."""
    return path.name != "last.ckpt", -settled(path).stat().st_mtime


def _others(file: Path) -> str:
    found = sorted(str(p) for p in file.parent.glob("*.ckpt") if p.name != file.name)
    return f"; take another: next to it there are {', '.join(found[:5])}" if found else ""


def _nearby(file: Path) -> str:
    folder = file
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    found = sorted(str(p) for p in folder.glob("*.ckpt")) or sorted(
        str(p) for p in folder.glob("checkpoints/*.ckpt")
    )
    return f"; there are {', '.join(found[:5])}" if found else f" (looked in {folder})"
