"""Rows that the ``datasets`` library holds: saved folders, data folders and hub ids.

Turns the many exceptions of that library into one clear line.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeAlias

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError

from okd_lightning.errors import DataError, DataNotFoundError

Row: TypeAlias = dict[str, Any]

_READ_ERRORS = (OSError, ValueError, RuntimeError, DatasetsError)
"""What ``datasets`` and ``huggingface_hub`` raise for missing, unreachable or unreadable sets."""


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _without_nulls(value: Any) -> Any:
    """Drop the nulls that Arrow writes where one struct lacks a field that another one has."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def rows_of_dataset(dataset: Dataset) -> list[Row]:
    """All rows as dictionaries; nested fields that a row does not have are absent, not None."""
    return [
        {name: _without_nulls(value) for name, value in row.items()} for row in dataset.to_list()
    ]


def _is_saved(folder: Path) -> bool:
    return (folder / "state.json").exists() or (folder / "dataset_dict.json").exists()


def read_folder(folder: Path, *, split: str, subset: str | None) -> list[Row]:
    """Rows of a folder that ``save_to_disk`` made, or of a folder of data files.

    Args:
        folder: An existing folder.
        split: Which split to take of a saved ``DatasetDict`` or of a folder of data files; a saved
            ``Dataset`` has none.
        subset: Which configuration of a folder of data files.

    Raises:
        DataError: The folder is neither, is broken, or lacks the split.
    """
    try:
        if _is_saved(folder):
            found = load_from_disk(str(folder))
        else:
            found = load_dataset(str(folder), subset, split=split)
    except _READ_ERRORS as error:
        raise DataError(
            f"{folder}: not a folder that `datasets` can read ({_first_line(error)}); expected one "
            f"made by Dataset.save_to_disk, or data files with a split {split!r}; "
            "or name a .jsonl file"
        ) from error
    if isinstance(found, DatasetDict):
        if split not in found:
            names = ", ".join(repr(str(name)) for name in found)
            raise DataError(f"{folder}: no split {split!r}; found: {names}; choose one of them")
        found = found[split]
    return rows_of_dataset(found)


def read_hub(hub_id: str, *, split: str, subset: str | None) -> list[Row]:
    """Rows of one split of a data set on the Hugging Face Hub (or in its local cache).

    Raises:
        DataNotFoundError: The Hub has no such data set or cannot be reached.
        DataError: The data set has no such split or subset, or cannot be read.
    """
    try:
        return rows_of_dataset(load_dataset(hub_id, subset, split=split))
    except OSError as error:
        raise DataNotFoundError(
            f"data set {hub_id!r}: no such file or folder here, and not to be had from the Hugging "
            f"Face Hub ({_first_line(error)}); check the spelling and the network, "
            "or give the path of a .jsonl file"
        ) from error
    except _READ_ERRORS as error:
        raise DataError(
            f"data set {hub_id!r}, split {split!r}, subset {subset!r}: cannot be read "
            f"({_first_line(error)}); check the names of the split and the subset"
        ) from error
