"""Rows of a JSONL file (an object per line) or a JSON file (one list of objects).

Owns the errors about broken files; not the columns of a row.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from okd_lightning.bounded_files import json_problem
from okd_lightning.data.text_files import read_text
from okd_lightning.errors import DataError

Row = dict[str, Any]

JSON_LINES = (".jsonl", ".ndjson")
JSON_SUFFIXES = (*JSON_LINES, ".json")
_JSON_TYPE_NAMES = {list: "a list", str: "a string", type(None): "null", bool: "a boolean"}


def _type_name(value: object) -> str:
    return _JSON_TYPE_NAMES.get(type(value), "a number")


def _read_lines(text: str, path: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(io.StringIO(text, newline=None), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            hint = "fix or delete the line"
            if line.strip() == "[":
                hint = "a list of rows belongs in a .json file"
            elif line.strip() == "{":
                hint = "write each row on one line"
            raise DataError(
                f"{path}, line {number}: not valid JSON ({error.msg} at character "
                f"{error.colno}); expected one JSON object per line; {hint}"
            ) from error
        if not isinstance(row, dict):
            hint = "; a list of rows belongs in a .json file" if isinstance(row, list) else ""
            raise DataError(
                f"{path}, line {number}: {_type_name(row)} where a JSON object such as "
                f'{{"prompt": "..."}} is expected{hint}'
            )
        rows.append(row)
    return rows


def _read_list(text: str, path: Path) -> list[Row]:
    if not text.strip():
        return []
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip().startswith("{"):
            return _read_lines(text, path)  # an object per line, the format of Dataset.to_json
        raise DataError(
            f"{path}, line {error.lineno}: not valid JSON ({error.msg} at character "
            f"{error.colno}); expected one list of objects, or an object per line"
        ) from error
    if not isinstance(rows, list):
        raise DataError(_no_list(rows, path))
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise DataError(
                f"{path}, row {number}: {_type_name(row)} where a JSON object such as "
                f'{{"prompt": "..."}} is expected'
            )
    return rows


def _no_list(found: object, path: Path) -> str:
    what = "an object" if isinstance(found, dict) else _type_name(found)
    within = [k for k, v in found.items() if isinstance(v, list)] if isinstance(found, dict) else []
    hint = f" (is it the one under {within[0]!r}?)" if len(within) == 1 else ""
    return (
        f"{path}: {what} where a list of JSON objects is expected; "
        f"put the rows into a list{hint}, or one per line into a .jsonl file"
    )


def read_json_rows(path: Path, kind: str) -> list[Row]:
    """Return all rows of a JSON file, in order; blank lines are skipped.

    Args:
        path: UTF-8, with or without byte order mark, also compressed (.gz).
        kind: ".jsonl" for an object per line; ".json" for one list of objects, or an object per
            line.

    Raises:
        DataError: The file is not UTF-8, cannot be opened, is not JSON, or holds something that is
            not an object.
    """
    read = _read_lines if kind in JSON_LINES else _read_list
    try:
        return read(read_text(path), path)
    except (RecursionError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: not valid JSON rows ({json_problem(error)})") from error
