"""Rows of a CSV or TSV file: the first line names the columns, and every cell is unchanged text.

No cell is interpreted: ``007`` keeps its zeros, ``NA`` is no null, an empty cell is an empty text.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator
from pathlib import Path

from okd_lightning.data.text_files import read_text
from okd_lightning.errors import DataError

CSV_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_OTHER_DELIMITERS = {";": "semicolons", "\t": "tabs", "|": "bars", ",": "commas"}


def _cells(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yield each record with the number of its last line; blank lines are skipped."""
    reader = csv.reader(io.StringIO(read_text(path), newline=""), delimiter=delimiter, strict=True)
    limit = csv.field_size_limit(sys.maxsize)  # the library's default: 131,072 characters a cell
    try:
        for cells in reader:
            if cells:
                yield reader.line_num, cells
    except csv.Error as error:
        raise DataError(
            f"{path}, line {reader.line_num}: not valid CSV ({error}); a cell with quotation "
            "marks, line breaks or delimiters stands in quotation marks, its own marks doubled"
        ) from error
    finally:
        csv.field_size_limit(limit)


def _check_header(path: Path, names: list[str], delimiter: str) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(
            f"{path}: the first line names {', '.join(map(repr, twice))} twice; expected the "
            "names of the columns, each once"
        )
    if len(names) > 1:
        return
    for other, word in _OTHER_DELIMITERS.items():
        if other != delimiter and other in names[0]:
            right = {"\t": "name it .tsv", ",": "name it .csv"}.get(other, "write it with commas")
            raise DataError(
                f"{path}: one column named {names[0]!r}: its cells seem to be separated by {word}, "
                f"expected {_OTHER_DELIMITERS[delimiter]}; {right}"
            )


def read_csv_rows(path: Path, delimiter: str) -> list[dict[str, str]]:
    """Return all rows of a CSV file, in order.

    Args:
        path: UTF-8, with or without byte order mark, also compressed (.gz).
        delimiter: Separator of cells.

    Raises:
        DataError: The file cannot be read, has no usable first line, or has a row with more or
            fewer cells than there are columns.
    """
    records = _cells(path, delimiter)
    _, names = next(records, (0, []))
    if not names:
        return []
    _check_header(path, names, delimiter)
    rows = []
    for line, cells in records:
        if len(cells) != len(names):
            raise DataError(
                f"{path}, line {line}: {len(cells)} cells where the first line names "
                f"{len(names)} columns; quote cells that hold a delimiter or a line break"
            )
        rows.append(dict(zip(names, cells, strict=True)))
    return rows
