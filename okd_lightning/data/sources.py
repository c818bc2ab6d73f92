"""Sources of rows: a file, a folder, a hub id, or rows in memory.

Owns their distinction and the error for a missing source. ``data_files`` and ``arrow`` read;
``columns`` interprets the columns.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
from datasets import Dataset, DatasetDict

from okd_lightning.data.arrow import read_folder, read_hub, rows_of_splits
from okd_lightning.data.data_files import FILE_KINDS, read_file, rows_of_dataset
from okd_lightning.errors import DataError, DataNotFoundError


@runtime_checkable
class MapStyleDataset(Protocol):
    """Rows by number: a list, a ``torch.utils.data.Dataset``, a ``datasets.Dataset``."""

    def __len__(self) -> int:
        """Return the number of rows."""

    def __getitem__(self, index: Any, /) -> Any:
        """Return the row of a number, a mapping from column to cell."""


DataSource: TypeAlias = str | Path | MapStyleDataset | DatasetDict
"""A path or hub id, or rows in memory."""

if TYPE_CHECKING:
    DataArgument: TypeAlias = DataSource
else:  # types of the command line
    DataArgument = str

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_FILE_SUFFIXES = (*FILE_KINDS, ".txt", ".arrow", ".gz", ".zst", ".zip", ".xlsx")


def describe_source(source: DataSource) -> str:
    """Return the source's name for messages: its path or hub id, or "rows in memory"."""
    return str(source) if isinstance(source, (str, Path)) else "rows in memory"


def _looks_like_path(source: str | Path) -> bool:
    text = str(source)
    return (
        isinstance(source, Path)
        or text.startswith((".", "/", "~"))
        or Path(text).suffix.lower() in _FILE_SUFFIXES
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
        near = [name for name in names if name.endswith((*FILE_KINDS, ".gz"))][:3]
    found = f"; did you mean {' or '.join(repr(name) for name in near)}?" if near else ""
    return DataNotFoundError(f"{path}: no such file in {folder.absolute()}{found}")


def _read_path(path: Path, *, split: str, subset: str | None) -> list[dict[str, Any]]:
    if path.is_dir():
        return read_folder(path, split=split, subset=subset)
    if not path.exists():
        raise _missing(path)
    return read_file(path)


def _copy_rows(source: MapStyleDataset) -> list[dict[str, Any]]:
    rows = []
    for number in range(len(source)):
        try:
            row = source[number]
        except (LookupError, TypeError) as error:
            raise DataError(
                f"a data set was given as {type(source).__name__}, whose row {number + 1} cannot "
                f"be read by its number ({type(error).__name__}: {error}); expected rows that are "
                "mappings, such as a list of them (of a DataFrame: frame.to_dict('records'))"
            ) from error
        if not isinstance(row, Mapping):
            raise DataError(
                f"rows in memory, row {number + 1}: {type(row).__name__} where a mapping such as "
                '{"prompt": "..."} is expected'
            )
        rows.append({name: _without_arrays(cell) for name, cell in row.items()})
    return rows


def _without_arrays(cell: Any) -> Any:
    """Return a cell with lists where pandas has arrays of objects."""
    if isinstance(cell, np.ndarray) and cell.dtype == object:
        return [_without_arrays(part) for part in cell]
    if isinstance(cell, dict):
        return {name: _without_arrays(part) for name, part in cell.items()}
    return cell


def _read(source: DataSource, *, split: str, subset: str | None) -> list[dict[str, Any]]:
    if isinstance(source, Dataset):
        return rows_of_dataset(source)
    if isinstance(source, DatasetDict):
        return rows_of_splits(source, split=split, where="rows in memory")
    if isinstance(source, (str, Path)):
        path = Path(source).expanduser()
        if path.exists() or _looks_like_path(source):
            return _read_path(path, split=split, subset=subset)
        return read_hub(str(source), split=split, subset=subset)
    if isinstance(source, MapStyleDataset) and not isinstance(source, (Mapping, bytes)):
        return _copy_rows(source)
    raise DataError(
        f"a data set was given as {type(source).__name__}; expected a path, a hub id, a list of "
        "mappings, a datasets.Dataset, or another data set with rows by number (__len__ and "
        "__getitem__); of one that only iterates give list(...)"
    )


def load_rows(
    source: DataSource, *, split: str = "train", subset: str | None = None
) -> list[dict[str, Any]]:
    """Read all rows of a dataset, in order.

    A string is a path if the path exists, or if it looks like one (starts with ``.``, ``/`` or
    ``~``, ends in a data file's suffix, has more than one slash); else it is a hub id.

    Args:
        source: A file (``.jsonl``, ``.json``, ``.csv``, ``.tsv``, ``.parquet``; all but the last
            also ``.gz``), a folder made by ``save_to_disk``, a folder of data files, a hub id, or
            in Python a map-style dataset of mappings (a list, a ``datasets.Dataset``, a torch
            ``Dataset``) or a ``DatasetDict``.
        split: Split of a hub id, a ``DatasetDict`` or a folder that has several; files and other
            rows in memory have none.
        subset: Configuration of a hub id.

    Returns:
        The rows as dictionaries, at least one.

    Raises:
        DataNotFoundError: The source does not exist.
        DataError: It is empty, broken, or not a list of objects.
    """
    if isinstance(source, str) and not source.strip():
        raise DataError("a data set was given as an empty name; expected a path or a hub id")
    rows = _read(source, split=split, subset=subset)
    if not rows:
        raise DataError(f"{describe_source(source)}: no rows; expected at least one")
    return rows
