"""Files that a resumed ModelCheckpoint may remove: those of its own folder only.

The state of a ModelCheckpoint names files that it removes when better ones come. In a moved run
they are in another folder; in a foreign checkpoint they could be any files.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import ModelCheckpoint

_PATHS = ("best_model_path", "kth_best_model_path", "last_model_path")


def settle_kept(trainer: lightning.Trainer, checkpoint: dict[str, Any]) -> None:
    """Find the files that ModelCheckpoints have kept in their folders, by name.

    A state whose files are not in its folder is dropped: that callback starts again.

    Args:
        trainer: A Trainer whose callbacks are set up.
        checkpoint: The checkpoint; its callbacks' states are replaced.
    """
    states = dict(checkpoint.get("callbacks", {}))
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        state = states.get(callback.state_key)
        if isinstance(callback, ModelCheckpoint) and isinstance(state, Mapping):
            settled = _in_folder(callback.dirpath, state)
            states.pop(callback.state_key)
            states |= {} if settled is None else {callback.state_key: settled}
    checkpoint["callbacks"] = states


def _in_folder(folder: Any, state: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a state with its paths in ``folder``; None where its files are not there."""

    def here(path: object) -> str:
        return str(Path(folder) / Path(str(path)).name) if path else ""

    if folder is None or "://" in str(folder):  # remote: kept only where nothing has moved
        return dict(state) if _is_within(folder, state) else None
    kept = {here(path): value for path, value in state.get("best_k_models", {}).items()}
    has_moved = state.get("dirpath") != folder
    if has_moved and not all(Path(path).exists() for path in kept):
        return None
    paths = {name: here(state.get(name)) for name in _PATHS}
    return {**state, **paths, "dirpath": folder, "best_k_models": kept}


def _is_within(folder: Any, state: Mapping[str, Any]) -> bool:
    named = [*state.get("best_k_models", {}), *(state.get(name) or folder for name in _PATHS)]
    return folder is not None and all(str(path).startswith(str(folder)) for path in named)
