"""Tables of a run (metrics.csv, rollouts.jsonl, measures.jsonl), and their cut at a resume.

Tables record a run and do not affect it: one that cannot be read is renamed, with a warning, and
the run continues without it. A new version of a table is complete before it replaces the old one.
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
"""Record that a signal has ended the run, and how to resume; removed when the run resumes."""

_UNREADABLE = (
    *(OSError, ValueError, ArithmeticError, LookupError, TypeError, RecursionError),
    csv.Error,
)


class RunCSVLogger(CSVLogger):
    """``metrics.csv`` directly in the run's folder; appends to an existing file.

    Every row is written at once, and a new column is added by one atomic replacement: if the
    process ends at any point, the rows before the last checkpoint exist.

    Args:
        folder: The run's folder.
    """

    def __init__(self, folder: str) -> None:
        super().__init__(save_dir=folder, name="", version="", flush_logs_every_n_steps=1)

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The writer; Lightning's own writer would delete an existing file."""
        if self._experiment is None:
            self._experiment = _AppendingWriter(log_dir=self.save_dir)
        return self._experiment

    def log_hyperparams(self, params: Any = None) -> None:
        """Do nothing: the run's settings are in config.yaml."""


class _AppendingWriter(ExperimentWriter):
    def _check_log_dir_exists(self) -> None:
        path = Path(self.log_dir) / METRICS_FILE
        found = read_or_set_aside(path, _read_rows)
        self.metrics_keys = found[0] if found is not None else []

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        path = Path(self.log_dir) / METRICS_FILE
        found = read_or_set_aside(path, _read_rows)
        write_whole(path, _as_csv(fieldnames, found[1] if found is not None else []))


def cut_metrics(
    path: Path, step: int, row: Mapping[str, float] | None, validation_is_due: bool
) -> str | None:
    """Return ``metrics.csv`` without the rows that the resumed run will write again.

    These are the rows from ``step`` on and, where a validation is due, that of the last step's.

    Args:
        path: The file; not changed, but renamed where it cannot be read.
        step: Optimizer steps done.
        row: Row of the last of these steps; added where it is missing.
        validation_is_due: True if the checkpoint precedes the validation after the last step.

    Returns:
        None where there is no table.
    """
    found = read_or_set_aside(path, _read_rows)
    if found is None:
        return None
    names, rows = found
    kept: list[Mapping[str, Any]] = [row for row in rows if _step_of(row) < step]
    if validation_is_due:
        kept = [row for row in kept if _step_of(row) < step - 1 or not _is_of_validation(row)]
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
    """Append measures on val or test data, with their checkpoint, to ``measures.jsonl``."""
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
    """Rename an unreadable table to ``NAME.broken``, with a warning."""
    numbered = (path.with_name(f"{path.name}.broken-{n}") for n in itertools.count(2))
    names = itertools.chain([path.with_name(f"{path.name}.broken")], numbered)
    target = next(name for name in names if not name.exists())
    path.rename(target)
    rank_zero_warn(
        f"{path} cannot be read ({problem}): it is {target.name} now, and a new one begins"
    )


def read_or_set_aside(path: Path, read: Callable[[Path], Any]) -> Any:
    """Return ``read(path)``; None where there is no file, or it was renamed as broken."""
    if not path.exists():
        return None
    try:
        return read(path)
    except _UNREADABLE as error:
        set_aside(path, " ".join(str(error).split()) or type(error).__name__)
        return None


def _read_rows(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Return the columns and rows of a ``metrics.csv``.

    Raises:
        ValueError: The file is not such a table.
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
    """Return the lines of a ``rollouts.jsonl``, each with its step.

    Raises:
        ValueError, KeyError, TypeError: The file is not such a table.
    """
    lines = _whole_lines(path).split("\n")[:-1]
    return [(line, int(json.loads(line)["step"])) for line in lines]


def _whole_lines(path: Path) -> str:
    """Return the text up to its last line break: a killed process leaves half a line.

    Raises:
        ValueError: The file is not text.
    """
    content = path.read_bytes()
    text = content[: content.rfind(b"\n") + 1].decode("utf-8")
    if "\0" in text:
        raise ValueError("it holds zero bytes")
    return text


def _step_of(row: Mapping[str, Any]) -> int:
    return int(float(row.get("step") or 0))


def _is_logged(row: Mapping[str, float], rows: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether one of ``rows`` is of the same step and kind (not of validation)."""
    own = row.keys() - {"step", "epoch"}
    same_step = [r for r in rows if _step_of(r) == row["step"]]
    return not own or any(r.get(name) for r in same_step for name in own)


def _is_of_validation(row: Mapping[str, Any]) -> bool:
    return any(value and name.startswith("val/") for name, value in row.items())


def _as_csv(names: list[str], rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=names)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
