"""Rows of a data file, by its suffix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from okd_lightning.bounded_files import most_bytes
from okd_lightning.data.csv_files import CSV_DELIMITERS, read_csv_rows
from okd_lightning.data.json_files import JSON_SUFFIXES, read_json_rows
from okd_lightning.data.text_files import kind_of_file
from okd_lightning.errors import DataError

Row = dict[str, Any]

FILE_KINDS = (*JSON_SUFFIXES, *CSV_DELIMITERS, ".parquet")
"""Suffixes that are read; all but Parquet also followed by ``.gz``."""

_LEAST, _ROWS = 4, 65_536
"""Bytes of a value that is read, at least; rows that are read at once, at most."""

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
        with pq.ParquetFile(path) as file:
            return rows_of_dataset(Dataset(_table_of(file, path.stat().st_size)))
    except OverflowError as error:
        raise DataError(f"{path}: {error}, which are not rows of text") from error
    except (OSError, pa.ArrowException) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"{path}: not a Parquet file that can be read ({reason})") from error


def _table_of(file: pq.ParquetFile, size: int) -> pa.Table:
    """All rows of a Parquet file, read in batches of limited size.

    A page of a dictionary and run lengths can encode any number of values: what a column holds is
    not known before it is read. One row of a flat column is no more than its dictionary; a row of
    a list is decoded whole.

    Raises:
        OverflowError: The file expands to more than rows of text do.
    """
    most, metadata = most_bytes(size), file.metadata
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    chunks = [group.column(i) for group in groups for i in range(group.num_columns)]
    named = sum(max(c.total_uncompressed_size, _LEAST * c.num_values) for c in chunks)
    if named > most:
        raise OverflowError(f"{size:,} bytes that expand to more than {most:,}")
    largest = max([c.total_uncompressed_size for c in chunks], default=0)
    found, read = [], 0
    rows = max(1, min(_ROWS, most // max(1, largest)))
    plain = pa.schema(map(_plain_field, file.schema_arrow), file.schema_arrow.metadata)
    for batch in file.iter_batches(rows):
        found.append(batch.cast(plain))
        read += found[-1].nbytes
        if read > most:
            raise OverflowError(f"{size:,} bytes that expand to more than {most:,}")
    return pa.Table.from_batches(found, plain)


def _plain_field(field: pa.Field) -> pa.Field:
    """The field without dictionaries, also of its parts: as many values as rows read."""
    kind = field.type
    if pa.types.is_dictionary(kind):
        return field.with_type(kind.value_type)
    if pa.types.is_struct(kind):
        return field.with_type(pa.struct([_plain_field(part) for part in kind]))
    if pa.types.is_list(kind):
        return field.with_type(pa.list_(_plain_field(kind.value_field)))
    if pa.types.is_large_list(kind):
        return field.with_type(pa.large_list(_plain_field(kind.value_field)))
    return field


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
