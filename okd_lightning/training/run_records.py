"""A run's tables: metrics.csv, rollouts.jsonl and measures.jsonl, written, and cut at a resume.

A table says what a run has done and decides nothing: one that cannot be read is set aside, with a
warning, and the run goes on without it. What is written over a table is complete before it takes
its place.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_warn

from okd_lightning.durable_files import write_whole

METRICS_FILE = "metrics.csv"
ROLLOUTS_FILE = "rollouts.jsonl"
MEASURES_FILE = "measures.jsonl"
STOPPED_FILE = "stopped.json"
"""Says that a signal has ended the run, and how to go on; gone when it goes on."""

_UNREADABLE = (
    *(OSError, ValueError, ArithmeticError, LookupError, TypeError, RecursionError),
    csv.Error,
)


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
    @rank_zero_experiment
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
        found = read_or_set_aside(path, _read_rows)
        self.metrics_keys = found[0] if found is not None else []

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        path = Path(self.log_dir) / METRICS_FILE
        found = read_or_set_aside(path, _read_rows)
        write_whole(path, _as_csv(fieldnames, found[1] if found is not None else []))


def cut_metrics(path: Path, step: int, row: Mapping[str, float] | None) -> str | None:
    """Return ``metrics.csv`` without the rows from ``step`` on.

    Args:
        path: The file; it is not changed, but set aside where it cannot be read.
        step: Optimizer steps done.
        row: What the last of these steps logs; added where it is missing.

    Returns:
        None where there is no table.
    """
    found = read_or_set_aside(path, _read_rows)
    if found is None:
        return None
    names, rows = found
    kept: list[Mapping[str, Any]] = [row for row in rows if _step_of(row) < step]
    if row is not None and not _is_logged(row, kept):
        names = sorted({*names, *row})
        kept.append(row)
    return _as_csv(names, kept)


def cut_rollouts(path: Path, step: int) -> str | None:
    """Return ``rollouts.jsonl`` without the records from ``step`` on; see ``cut_metrics``."""
    found = read_or_set_aside(path, _read_records)
    if found is None:
        return None
    return "".join(line + "\n" for line, of_step in found if of_step < step)


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
    if path.exists() and not path.is_file():
        set_aside(path, "no file")
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def set_aside(path: Path, problem: str) -> None:
    """Give what stands in a table's place another name, ``NAME.broken``, and say so."""
    numbered = (path.with_name(f"{path.name}.broken-{n}") for n in itertools.count(2))
    names = itertools.chain([path.with_name(f"{path.name}.broken")], numbered)
    target = next(name for name in names if not name.exists())
    path.rename(target)
    rank_zero_warn(
        f"{path} cannot be read ({problem}): it is {target.name} now, and a new one begins"
    )


def read_or_set_aside(path: Path, read: Callable[[Path], Any]) -> Any:
    """Return what ``read`` makes of a file; None where there is none, or it was set aside."""
    if not path.exists():
        return None
    try:
        return read(path)
    except _UNREADABLE as error:
        set_aside(path, " ".join(str(error).split()) or type(error).__name__)
        return None


def _read_rows(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """The columns and rows of a ``metrics.csv``.

    Raises:
        ValueError: It is none.
    """
    reader = csv.DictReader(io.StringIO(_whole_lines(path), newline=""), restkey="")
    rows = list(reader)
    names = list(reader.fieldnames or [])
    if names and "step" not in names:
        raise ValueError("it has no column named step")
    if len({*names}) < len(names):
        raise ValueError("it has a column twice")
    for number, row in enumerate(rows, 2):
        if "" in row or None in row.values():
            raise ValueError(f"line {number} has another number of cells than the first")
        _step_of(row)
    return names, rows


def _read_records(path: Path) -> list[tuple[str, int]]:
    """The lines of a ``rollouts.jsonl``, each with its step.

    Raises:
        ValueError, KeyError, TypeError: It is none.
    """
    lines = _whole_lines(path).split("\n")[:-1]
    return [(line, int(json.loads(line)["step"])) for line in lines]


def _whole_lines(path: Path) -> str:
    """The text up to its last line break: a killed process leaves half a line.

    Raises:
        ValueError: It is no text.
    """
    content = path.read_bytes()
    text = content[: content.rfind(b"\n") + 1].decode("utf-8")
    if "\0" in text:
        raise ValueError("it holds zero bytes")
    return text


def _step_of(row: Mapping[str, Any]) -> int:
    return int(float(row.get("step") or 0))


def _is_logged(row: Mapping[str, float], rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether one of ``rows`` is of the same step and kind (not of validation)."""
    own = row.keys() - {"step", "epoch"}
    same_step = [r for r in rows if _step_of(r) == row["step"]]
    return not own or any(r.get(name) for r in same_step for name in own)


def _as_csv(names: list[str], rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=names)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
