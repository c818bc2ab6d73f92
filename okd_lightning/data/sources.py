"""Where rows come from: a file, a folder, a hub id, or what the caller already holds.

Owns telling these apart and the message when nothing is there. Reading is in ``json_files`` and
``arrow``; what the columns mean is in ``columns``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from datasets import Dataset

from okd_lightning.data.arrow import read_folder, read_hub, rows_of_dataset
from okd_lightning.data.json_files import JSON_SUFFIXES, read_json_rows
from okd_lightning.errors import DataError, DataNotFoundError

DataSource: TypeAlias = str | Path | Sequence[Mapping[str, Any]] | Dataset
"""A path or hub id, or rows in memory."""

if TYPE_CHECKING:
    DataArgument: TypeAlias = DataSource
else:  # what can be typed on a command line
    DataArgument = str

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_FILE_SUFFIXES = (*JSON_SUFFIXES, ".csv", ".tsv", ".txt", ".parquet", ".arrow", ".gz", ".zst")


def describe_source(source: DataSource) -> str:
    """How messages call this source: its path or hub id, or "rows in memory"."""
    return str(source) if isinstance(source, (str, Path)) else "rows in memory"


def _looks_like_path(source: str | Path) -> bool:
    text = str(source)
    return (
        isinstance(source, Path)
        or text.startswith((".", "/", "~"))
        or Path(text).suffix in _FILE_SUFFIXES
        or not _HUB_ID.fullmatch(text)
    )


def _missing(path: Path) -> DataNotFoundError:
    folder = path.parent
    if not folder.is_dir():
        return DataNotFoundError(
            f"{path}: no such file, and no folder {folder}; check the path "
            f"(relative to {Path.cwd()})"
        )
    names = sorted(entry.name for entry in folder.iterdir())
    near = get_close_matches(path.name, names, n=3, cutoff=0.5)
    if not near:
        near = [name for name in names if name.endswith(JSON_SUFFIXES)][:3]
    found = f"; did you mean {' or '.join(repr(name) for name in near)}?" if near else ""
    return DataNotFoundError(f"{path}: no such file in {folder.absolute()}{found}")


def _read_path(path: Path, *, split: str, subset: str | None) -> list[dict[str, Any]]:
    if path.is_dir():
        return read_folder(path, split=split, subset=subset)
    if not path.exists():
        raise _missing(path)
    if path.suffix not in JSON_SUFFIXES:
        raise DataError(
            f"{path}: a file of type {path.suffix or '(no suffix)'!r}; expected .jsonl (an object "
            "a line) or .json (a list of objects); convert it, e.g. with datasets' to_json"
        )
    return read_json_rows(path)


def _copy_rows(source: Sequence[object]) -> list[dict[str, Any]]:
    rows = []
    for number, row in enumerate(source, start=1):
        if not isinstance(row, Mapping):
            raise DataError(
                f"rows in memory, row {number}: {type(row).__name__} where a mapping such as "
                '{"prompt": "..."} is expected'
            )
        rows.append(dict(row))
    return rows


def _read(source: DataSource, *, split: str, subset: str | None) -> list[dict[str, Any]]:
    if isinstance(source, Dataset):
        return rows_of_dataset(source)
    if isinstance(source, (str, Path)):
        path = Path(source).expanduser()
        if path.exists() or _looks_like_path(source):
            return _read_path(path, split=split, subset=subset)
        return read_hub(str(source), split=split, subset=subset)
    if isinstance(source, Sequence):
        return _copy_rows(source)
    raise DataError(
        f"a data set was given as {type(source).__name__}; expected a path, a hub id, "
        "a list of mappings or a datasets.Dataset"
    )


def load_rows(
    source: DataSource, *, split: str = "train", subset: str | None = None
) -> list[dict[str, Any]]:
    """Read all rows of a data set, in order.

    A string is a path where something exists there, or where it looks like one (starts with ``.``,
    ``/`` or ``~``, ends in a data file's suffix, has more than one slash); else it is a hub id.

    Args:
        source: A ``.jsonl`` file (an object a line), a ``.json`` file (a list of objects), a folder
            made by ``save_to_disk``, a hub id, a sequence of mappings, or a ``datasets.Dataset``.
        split: Which split of a hub id or of a folder that has several; files and rows in memory
            have none.
        subset: Which configuration of a hub id.

    Returns:
        The rows as dictionaries, at least one.

    Raises:
        DataNotFoundError: Nothing is there.
        DataError: What is there is empty, broken, or not a list of objects.
    """
    if isinstance(source, str) and not source.strip():
        raise DataError("a data set was given as an empty name; expected a path or a hub id")
    rows = _read(source, split=split, subset=subset)
    if not rows:
        raise DataError(f"{describe_source(source)}: no rows; expected at least one")
    return rows
