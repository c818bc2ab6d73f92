"""Rows of a data file, by its suffix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
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
"""Minimum bytes of a value that is read; maximum rows that are read at once."""

_EXPECTED = (
    "expected .jsonl (an object per line), .json (a list of objects), .csv or .tsv (also .gz of "
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
            nested = _check_named_size(file, path.stat().st_size)
        with pq.ParquetFile(path, read_dictionary=nested) as file:
            return rows_of_dataset(Dataset(_table_of(file, path.stat().st_size)))
    except OverflowError as error:
        raise DataError(f"{path}: {error}, which are not rows of text") from error
    except (OSError, pa.ArrowException) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"{path}: not a Parquet file that can be read ({reason})") from error


def _chunks(file: pq.ParquetFile) -> list[tuple[pq.ColumnSchema, pq.ColumnChunkMetaData]]:
    groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
    columns = range(len(file.schema))
    return [(file.schema.column(i), group.column(i)) for group in groups for i in columns]


def _check_named_size(file: pq.ParquetFile, size: int) -> list[str]:
    """Refuse a file whose numbers of values and sizes are too large.

    Returns:
        The columns of texts within lists. A row of them has any number of values, so they are read
        as indices into a dictionary, of 4 bytes each, whose texts are in memory once.

    Raises:
        OverflowError: The file expands to more bytes than rows of text can.
    """
    named = 0
    for column, chunk in _chunks(file):
        width = max(_LEAST, column.length or 0)  # of a value; the length of FIXED_LEN_BYTE_ARRAY
        named += max(chunk.total_uncompressed_size, width * chunk.num_values)
    if named > most_bytes(size):
        raise OverflowError(f"{size:,} bytes that expand to more than {most_bytes(size):,}")
    columns = [file.schema.column(i) for i in range(len(file.schema))]
    are_texts = [c for c in columns if c.physical_type == "BYTE_ARRAY" and c.max_repetition_level]
    return [column.path for column in are_texts]


def _table_of(file: pq.ParquetFile, size: int) -> pa.Table:
    """All rows of a Parquet file, read in batches of limited size.

    A page of a dictionary and run lengths can encode any number of values: what a column holds is
    not known before it is read. One row of a flat column is no more than its dictionary, and the
    texts of a list are counted before they are written out.

    Raises:
        OverflowError: The file expands to more bytes than rows of text can.
    """
    most, read, found = most_bytes(size), 0, []
    largest = max([chunk.total_uncompressed_size for _, chunk in _chunks(file)], default=0)
    rows = max(1, min(_ROWS, most // max(1, largest)))
    plain = pa.schema(map(_plain_field, file.schema_arrow), file.schema_arrow.metadata)
    for batch in file.iter_batches(rows):
        read += sum(map(_plain_bytes, batch.columns))
        if read > most:
            raise OverflowError(f"{size:,} bytes that expand to more than {most:,}")
        found.append(batch.cast(plain))
    return pa.Table.from_batches(found, plain)


def _plain_bytes(values: pa.Array) -> int:
    """Return the bytes of an array without dictionaries, before it is written out."""
    kind = values.type
    if pa.types.is_dictionary(kind):
        known = values.dictionary
        if not (pa.types.is_string(known.type) or pa.types.is_binary(known.type)):
            return len(values) * max(1, known.nbytes // max(1, len(known)))
        lengths = pc.binary_length(known).take(values.indices.drop_null())
        return values.indices.nbytes + (pc.sum(lengths).as_py() or 0)
    if pa.types.is_struct(kind):
        return sum(map(_plain_bytes, values.flatten()))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return 4 * len(values) + _plain_bytes(values.flatten())
    return values.nbytes


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
