"""Rows of a data file, by its suffix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from okd_lightning.data.csv_files import CSV_DELIMITERS, read_csv_rows
from okd_lightning.data.json_files import JSON_SUFFIXES, read_json_rows
from okd_lightning.data.text_files import kind_of_file
from okd_lightning.errors import DataError

Row = dict[str, Any]

FILE_KINDS = (*JSON_SUFFIXES, *CSV_DELIMITERS, ".parquet")
"""Suffixes that are read; all but Parquet also followed by ``.gz``."""

_EXPECTED = (
    "expected .jsonl (an object a line), .json (a list of objects), .csv or .tsv (also .gz of "
    "these), or .parquet"
)


def without_nulls(value: Any) -> Any:
    """Drop the nulls that Arrow adds to a struct for fields of other structs."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def rows_of_dataset(dataset: Dataset) -> list[Row]:
    """Return all rows as dictionaries; missing nested fields are absent, not None."""
    return [
        {name: without_nulls(value) for name, value in row.items()} for row in dataset.to_list()
    ]


def _read_parquet(path: Path) -> list[Row]:
    try:
        return rows_of_dataset(Dataset(pq.ParquetFile(path).read()))
    except (OSError, pa.ArrowException) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"{path}: not a Parquet file that can be read ({reason})") from error


def read_file(path: Path, kind: str | None = None, delimiter: str | None = None) -> list[Row]:
    """Return all rows of one file, in order.

    JSON keeps its types; cells of CSV are text. Neither is interpreted further (``datasets``' own
    readers convert ``007`` to 7.0 and a date to a timestamp).

    Args:
        path: An existing file.
        kind: Its kind, if it differs from the file's suffix.
        delimiter: Separator of CSV cells; by default the suffix's.

    Raises:
        DataError: The file is of another kind, or broken.
    """
    kind = kind or kind_of_file(path)
    if kind in JSON_SUFFIXES:
        return read_json_rows(path, kind)
    if kind in CSV_DELIMITERS:
        return read_csv_rows(path, delimiter or CSV_DELIMITERS[kind])
    if kind == ".parquet" and path.suffix.lower() != ".gz":
        return _read_parquet(path)
    raise DataError(
        f"{path}: a file of type {path.suffix or '(no suffix)'!r}; {_EXPECTED}; convert it, e.g. "
        "with datasets' to_json"
    )
