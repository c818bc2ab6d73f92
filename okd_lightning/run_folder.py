"""A run's folder: config.yaml, metrics.csv, rollouts.jsonl, measures.jsonl, checkpoints; none lost.

A new run never overwrites an older one's files: they are moved to ``earlier/<n>``. A resumed run
appends to them, after cutting back what was written behind the checkpoint.
"""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_info

from okd_lightning.durable_files import remove_leftovers, write_whole
from okd_lightning.errors import OutputError

DEFAULT_FOLDER = "runs/default"
CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.csv"
ROLLOUTS_FILE = "rollouts.jsonl"
MEASURES_FILE = "measures.jsonl"
_FILES = (CONFIG_FILE, METRICS_FILE, ROLLOUTS_FILE, MEASURES_FILE)
_RUN_ENTRIES = (*_FILES, "checkpoints", "tensorboard")


@dataclass(frozen=True)
class PreparedRun:
    """A folder that a run is about to write in, and how it was before.

    Attributes:
        folder: The run's folder.
        earlier: Where the files of an older run went.
        kept: Entries of the folder that are not this run's own.
        contents: Files as they were before a resumed run cut them back.
    """

    folder: Path
    earlier: Path | None = None
    kept: frozenset[str] = frozenset()
    contents: Mapping[str, bytes] = field(default_factory=dict)

    def withdraw(self) -> None:
        """Put the folder back: for a run that failed before its first step."""
        for name in _RUN_ENTRIES:
            if name not in self.kept:
                _remove(self.folder / name)
        for name, content in self.contents.items():
            write_whole(self.folder / name, content)
        if self.earlier is not None:
            for path in self.earlier.iterdir():
                path.rename(self.folder / path.name)
            _remove_empty(self.earlier)
            _remove_empty(self.earlier.parent)
            rank_zero_info(f"nothing was trained; the run of before is back in {self.folder}")
        _remove_empty(self.folder)


def require_writable(folder: Path, option: str) -> None:
    """Make ``folder`` and try to write in it.

    Raises:
        OutputError: It cannot be made or written.
    """
    probe = folder / ".write-test"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink(missing_ok=True)  # another process may have been here
    except OSError as error:
        raise OutputError(
            f"{option} {str(folder)!r} cannot be written ({error.strerror}); choose another folder"
        ) from error


def start_run(folder: Path) -> PreparedRun:
    """Make room for a new run: move an older one's files to ``earlier/<n>``.

    Returns:
        How to take it back.

    Raises:
        OutputError: The folder cannot be written.
    """
    require_writable(folder, "--trainer.default_root_dir")
    found = [name for name in _RUN_ENTRIES if (folder / name).exists()]
    if not found:
        return PreparedRun(folder)
    number = 1
    while (folder / "earlier" / str(number)).exists():
        number += 1
    target = folder / "earlier" / str(number)
    target.mkdir(parents=True)
    for name in found:
        (folder / name).rename(target / name)
    rank_zero_info(f"{folder} held a run; its files are in {target} now")
    return PreparedRun(folder, earlier=target)


def resume_run(folder: Path, step: int, row: Mapping[str, float] | None = None) -> PreparedRun:
    """Cut metrics.csv and rollouts.jsonl back to a checkpoint's step.

    Args:
        folder: The run's folder.
        step: Optimizer steps done at the checkpoint.
        row: What the checkpoint's own step logs. Lightning logs it when the checkpoint has been
            written, so that a run killed between the two has not: it is added where it is missing.

    Returns:
        How to take it back.

    Raises:
        OutputError: The folder cannot be written.
    """
    require_writable(folder, "--trainer.default_root_dir")
    for place in (folder, folder / "checkpoints"):
        remove_leftovers(place)
    hparams = folder / "tensorboard" / "hparams.yaml"
    files = [hparams, *(folder / name for name in (CONFIG_FILE, METRICS_FILE, ROLLOUTS_FILE))]
    contents = {
        str(path.relative_to(folder)): path.read_bytes() for path in files if path.is_file()
    }
    hparams.unlink(missing_ok=True)  # its logger writes it only where there is none
    _cut_metrics(folder / METRICS_FILE, step, row)
    _cut_rollouts(folder / ROLLOUTS_FILE, step)
    kept = frozenset(name for name in _RUN_ENTRIES if (folder / name).exists())
    return PreparedRun(folder, kept=kept, contents=contents)


def note_measures(
    folder: str, part: str, data: str, checkpoint: object, measures: Mapping[str, float]
) -> None:
    """Add what was measured on val or test data, of which checkpoint, to ``measures.jsonl``."""
    entry = {
        "part": part,
        "checkpoint": None if checkpoint is None else str(checkpoint),
        "data": data,
        "measures": dict(sorted(measures.items())),
    }
    path = Path(folder) / MEASURES_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


class RunCSVLogger(CSVLogger):
    """``metrics.csv`` directly in the run's folder; appends to what is there.

    Every row is written at once, and what a new column changes of the file is changed in one move:
    whatever ends the process, the rows before the last checkpoint are there.

    Args:
        folder: The run's folder.
    """

    def __init__(self, folder: str) -> None:
        super().__init__(save_dir=folder, name="", version="", flush_logs_every_n_steps=1)

    @property
    def experiment(self) -> Any:
        """The writer; Lightning's own would delete a file that is there."""
        if self._experiment is None:
            self._experiment = _AppendingWriter(log_dir=self.save_dir)
        return self._experiment

    def log_hyperparams(self, params: Any = None) -> None:
        """Nothing: the run's settings are in config.yaml."""


class _AppendingWriter(ExperimentWriter):
    def _check_log_dir_exists(self) -> None:
        path = Path(self.log_dir) / METRICS_FILE
        if path.exists():
            with path.open(newline="") as file:
                self.metrics_keys = next(csv.reader(file), [])

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        path = Path(self.log_dir) / METRICS_FILE
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        _write_rows(path, fieldnames, rows)


def _cut_metrics(path: Path, step: int, row: Mapping[str, float] | None) -> None:
    if not path.exists():
        return
    reader = csv.DictReader(io.StringIO(_whole_lines(path), newline=""))
    rows: list[Mapping[str, Any]] = list(reader)
    names = list(reader.fieldnames or [])
    kept = [row for row in rows if int(float(row.get("step") or 0)) < step]
    if row is not None and not _is_logged(row, kept):
        names = sorted({*names, *row})
        kept.append(row)
    _write_rows(path, names, kept)


def _is_logged(row: Mapping[str, float], rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether one of ``rows`` is of the same step and kind (not of validation)."""
    own = row.keys() - {"step", "epoch"}
    same_step = [r for r in rows if int(float(r.get("step") or 0)) == row["step"]]
    return not own or any(r.get(name) for r in same_step for name in own)


def _write_rows(path: Path, names: list[str], rows: Sequence[Mapping[str, Any]]) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=names)
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, text.getvalue())


def _cut_rollouts(path: Path, step: int) -> None:
    if not path.exists():
        return
    lines = _whole_lines(path).split("\n")[:-1]
    kept = [line + "\n" for line in lines if json.loads(line)["step"] < step]
    write_whole(path, "".join(kept))


def _whole_lines(path: Path) -> str:
    """The text up to its last line break: a killed process leaves half a line."""
    text = path.read_bytes().decode("utf-8", errors="replace")
    return text[: text.rfind("\n") + 1]


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _remove_empty(folder: Path) -> None:
    if not any(folder.iterdir()):
        folder.rmdir()
