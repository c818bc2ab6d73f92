"""Rows of a JSONL file (an object a line) or a JSON file (one list of objects).

Owns reading and the messages about broken files; which columns a row has is not its business.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from okd_lightning.errors import DataError

Row = dict[str, Any]

JSON_SUFFIXES = (".jsonl", ".json")
_JSON_TYPE_NAMES = {list: "a list", str: "a string", type(None): "null", bool: "a boolean"}


def _type_name(value: object) -> str:
    return _JSON_TYPE_NAMES.get(type(value), "a number")


def _read_lines(path: Path) -> list[Row]:
    rows = []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{path}, line {number}: not valid JSON ({error.msg} at character "
                    f"{error.colno}); expected one JSON object a line; mend or delete the line"
                ) from error
            if not isinstance(row, dict):
                hint = "; a list of rows belongs in a .json file" if isinstance(row, list) else ""
                raise DataError(
                    f"{path}, line {number}: {_type_name(row)} where a JSON object such as "
                    f'{{"prompt": "..."}} is expected{hint}'
                )
            rows.append(row)
    return rows


def _read_list(path: Path) -> list[Row]:
    text = path.read_text(encoding="utf-8-sig")
    if not text.strip():
        return []
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}, line {error.lineno}: not valid JSON ({error.msg} at character "
            f"{error.colno}); expected one list of objects; "
            "if it holds one object a line, name it .jsonl"
        ) from error
    if not isinstance(rows, list):
        found = "an object" if isinstance(rows, dict) else _type_name(rows)
        raise DataError(
            f"{path}: {found} where a list of JSON objects is expected; "
            "put the rows into a list, or one a line into a .jsonl file"
        )
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise DataError(
                f"{path}, row {number}: {_type_name(row)} where a JSON object such as "
                f'{{"prompt": "..."}} is expected'
            )
    return rows


def read_json_rows(path: Path) -> list[Row]:
    """All rows of a ``.jsonl`` or ``.json`` file, in order; blank lines are passed over.

    Raises:
        DataError: The file is not UTF-8, cannot be opened, is not JSON, or holds something that is
            not an object.
    """
    read = _read_lines if path.suffix == ".jsonl" else _read_list
    try:
        return read(path)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8 text (byte {error.start}: {error.reason}); convert it to UTF-8"
        ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
