"""A run's folder: config.yaml, tables and checkpoints; files of an older run are kept.

A new run never overwrites an older run's files: they are moved to ``earlier/<n>``. A resumed run
appends to them, after removing rows written after the checkpoint. ``run_records`` owns the contents
of the tables.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info

from okd_lightning.durable_files import remove_leftovers, require_writable, write_whole
from okd_lightning.errors import OutputError
from okd_lightning.training.run_records import (
    MEASURES_FILE,
    METRICS_FILE,
    ROLLOUTS_FILE,
    STOPPED_FILE,
    cut_metrics,
    cut_rollouts,
    read_or_set_aside,
    set_aside,
)

CONFIG_FILE = "config.yaml"
_FILES = (CONFIG_FILE, METRICS_FILE, ROLLOUTS_FILE, MEASURES_FILE, STOPPED_FILE)
_FOLDERS = ("checkpoints", "tensorboard")
_EARLIER = "earlier"


@dataclass(frozen=True)
class PreparedRun:
    """A folder prepared for a run, and its earlier state.

    Attributes:
        folder: The run's folder.
        earlier: Folder to which the files of an older run were moved.
        kept: Entries of the folder that are not this run's own.
        contents: Files as they were before a resumed run cut them.
    """

    folder: Path
    earlier: Path | None = None
    kept: frozenset[str] = frozenset()
    contents: Mapping[str, bytes] = field(default_factory=dict)

    def withdraw(self) -> None:
        """Restore the folder: for a run that failed before its first step."""
        for name in (*_FILES, *_FOLDERS):
            if name not in self.kept:
                _remove(self.folder / name)
        for name, content in self.contents.items():
            write_whole(self.folder / name, content)
        if self.earlier is not None:
            for path in self.earlier.iterdir():
                _move_back(path, self.folder / path.name)
            _remove_empty(self.earlier)
            _remove_empty(self.earlier.parent)
            rank_zero_info(f"nothing was trained; the earlier run is restored in {self.folder}")
        _remove_empty(self.folder)


def start_run(folder: Path) -> PreparedRun:
    """Make room for a new run: move an older one's files to ``earlier/<n>``.

    Returns:
        The prepared run, which can be withdrawn.

    Raises:
        OutputError: The folder cannot be written.
    """
    require_writable(folder, "--trainer.default_root_dir")
    _refuse_lost_links(folder)
    found = [name for name in (*_FILES, *_FOLDERS) if _holds_something(folder / name)]
    if not found:
        return PreparedRun(folder)
    target = _next_number(folder / _EARLIER)
    try:
        target.mkdir(parents=True)
    except OSError as error:
        raise OutputError(
            f"{folder} holds a run, whose files cannot be moved to {target} ({error.strerror}): "
            "give --trainer.default_root_dir another folder, or --ckpt_path last to resume that run"
        ) from error
    for name in found:
        _move_away(folder / name, target / name)
    rank_zero_info(f"{folder} held a run; its files are in {target} now")
    return PreparedRun(folder, earlier=target)


def resume_run(
    folder: Path,
    step: int,
    row: Mapping[str, float] | None = None,
    validation_is_due: bool = False,
) -> PreparedRun:
    """Cut metrics.csv and rollouts.jsonl at a checkpoint's step.

    Args:
        folder: The run's folder.
        step: Optimizer steps done at the checkpoint.
        row: Row that the checkpoint's own step logs. Lightning logs it after the checkpoint was
            written, so a run killed between the two has not logged it: it is added where it is
            missing.
        validation_is_due: True if the checkpoint precedes the validation after its last step,
            which the resumed run repeats: a killed attempt may have logged it.

    Returns:
        The prepared run, which can be withdrawn.

    Raises:
        OutputError: The folder cannot be written.
    """
    require_writable(folder, "--trainer.default_root_dir")
    _refuse_lost_links(folder)
    for name in _FOLDERS:
        if (folder / name).is_file():
            set_aside(folder / name, "a file where a folder belongs")
    for place in (folder, folder / "checkpoints"):
        remove_leftovers(place)
    hparams = folder / "tensorboard" / "hparams.yaml"
    files = [hparams, *(folder / name for name in _FILES if name != MEASURES_FILE)]
    contents = {
        str(path.relative_to(folder)): content
        for path in files
        if (content := read_or_set_aside(path, Path.read_bytes)) is not None
    }
    tables = {
        METRICS_FILE: cut_metrics(folder / METRICS_FILE, step, row, validation_is_due),
        ROLLOUTS_FILE: cut_rollouts(folder / ROLLOUTS_FILE, step),
    }
    for name, table in tables.items():
        if table is not None:
            write_whole(folder / name, table)
    hparams.unlink(missing_ok=True)  # its logger writes it only if it is missing
    kept = frozenset(name for name in (*_FILES, *_FOLDERS) if (folder / name).exists())
    return PreparedRun(folder, kept=kept, contents=contents)


def _next_number(folder: Path) -> Path:
    number = 1
    while (folder / str(number)).exists():
        number += 1
    return folder / str(number)


def _refuse_lost_links(folder: Path) -> None:
    """Refuse a link to a missing folder: nothing could be written through it.

    Raises:
        OutputError: There is such a link; the message names it.
    """
    for name in _FOLDERS:
        path = folder / name
        if path.is_symlink() and not path.exists():
            raise OutputError(
                f"{path} is a link to {path.readlink()}, which is not there: mount or make that "
                "folder, or remove the link"
            )


def _move_away(path: Path, target: Path) -> None:
    """Rename ``path``; of a link to a folder, move the contents of that folder, on its own disk.

    The link stays, so that the next run writes to the same folder.
    """
    if not _is_linked_folder(path):
        path.rename(target)
        return
    aside = _next_number(path.resolve() / _EARLIER)
    aside.mkdir(parents=True)
    for entry in _entries(path):
        entry.rename(aside / entry.name)
    target.symlink_to(aside)


def _move_back(path: Path, target: Path) -> None:
    """Undo ``_move_away(target, path)``."""
    if not _is_linked_folder(target):
        path.rename(target)
        return
    aside = path.resolve()
    for entry in aside.iterdir():
        entry.rename(target / entry.name)
    path.unlink()
    _remove_empty(aside)
    _remove_empty(aside.parent)


def _holds_something(path: Path) -> bool:
    """Return whether the path exists; a link made for the first run leads to an empty folder."""
    return bool(_entries(path)) if _is_linked_folder(path) else path.exists()


def _is_linked_folder(path: Path) -> bool:
    return path.is_symlink() and path.is_dir()


def _entries(linked: Path) -> list[Path]:
    """Return a run's entries in a linked folder; earlier runs are in ``earlier`` there."""
    return [entry for entry in linked.resolve().iterdir() if entry.name != _EARLIER]


def _remove(path: Path) -> None:
    if _is_linked_folder(path):
        for entry in _entries(path):
            _remove(entry)
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _remove_empty(folder: Path) -> None:
    if not any(folder.iterdir()):
        folder.rmdir()
