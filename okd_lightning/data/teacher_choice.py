"""The teacher of each row, which a column names, where a run has several to choose from."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

from okd_lightning.data.columns import RawRow, require_column
from okd_lightning.errors import ConfigError, DataError

_NEAR = 0.5


def check_choice(column: str | None, names: Sequence[str]) -> None:
    """Refuse a column without teachers to choose from, and such teachers without a column.

    Args:
        column: ``data.teacher_column``.
        names: Names of the run's teachers; none where there is one for all rows.

    Raises:
        ConfigError: The message says what to give or leave out.
    """
    if column is not None and not names:
        raise ConfigError(
            f"data.teacher_column {column!r} has no effect: give --model.teacher "
            "RoutedTeachers with --model.teacher.teachers, or leave it out"
        )
    if column is None and names:
        raise ConfigError(
            f"--model.teacher RoutedTeachers has a teacher for each row ({', '.join(names)}): give "
            "--data.teacher_column the name of the column that holds it"
        )


def teachers_of(rows: Sequence[RawRow], column: str, names: Sequence[str], where: str) -> list[int]:
    """Return the number of each row's teacher.

    Args:
        rows: The raw rows.
        column: The column that names it; a whole number is read as its digits.
        names: Names of the teachers.
        where: The dataset's name for messages.

    Raises:
        DataError: The column is missing, or a row names no teacher or an unknown one.
    """
    require_column(rows[0], "teacher", column, where)
    numbers = {name: number for number, name in enumerate(names)}
    found = []
    for place, row in enumerate(rows, start=1):
        value = row.get(column)
        name = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
        if not isinstance(name, str) or name not in numbers:
            raise DataError(f"{where}, row {place}: {_refusal(value, column, names)}")
        found.append(numbers[name])
    return found


def _refusal(value: Any, column: str, names: Sequence[str]) -> str:
    there_are = f"--model.teacher.teachers has {', '.join(names)}"
    if value is None or value == "":
        return f"no teacher ({column!r} is empty), and {there_are}; fill or delete the row"
    near = get_close_matches(str(value), names, n=1, cutoff=_NEAR)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"the teacher ({column!r}) is {value!r}, and {there_are}{hint}"
