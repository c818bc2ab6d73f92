"""Datasets of the ``datasets`` library: saved folders, folders of data files, hub ids.

``datasets`` finds the files and their splits; JSON, CSV and Parquet files are read by
``data_files``, like a file given by its path. Exceptions of the library become one-line errors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from datasets import (
    Dataset,
    DatasetBuilder,
    DatasetDict,
    DownloadManager,
    ReadInstruction,
    load_dataset,
    load_dataset_builder,
    load_from_disk,
)
from datasets.exceptions import DatasetsError

from okd_lightning.data.data_files import FILE_KINDS, read_file, rows_of_dataset
from okd_lightning.data.text_files import kind_of_file
from okd_lightning.errors import DataError, DataNotFoundError

Row: TypeAlias = dict[str, Any]

_READ_ERRORS = (OSError, ValueError, RuntimeError, DatasetsError)
"""Errors of ``datasets`` and ``huggingface_hub`` for missing or unreadable datasets."""

_SPLIT_OPTIONS = "--data.train_split, --data.val_split or --data.test_split"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _is_saved(folder: Path) -> bool:
    return (folder / "state.json").exists() or (folder / "dataset_dict.json").exists()


def _no_split(where: str, split: str, found: Sequence[object]) -> DataError:
    names = ", ".join(repr(str(name)) for name in found)
    return DataError(
        f"{where}: no split {split!r}; found: {names}; choose one of them with {_SPLIT_OPTIONS}"
    )


def rows_of_splits(splits: Mapping[Any, Dataset], *, split: str, where: str) -> list[Row]:
    """Return the rows of one split of a ``DatasetDict``.

    Raises:
        DataError: It has no such split.
    """
    if split not in splits:
        raise _no_split(where, split, list(splits))
    return rows_of_dataset(splits[split])


def _own_files(builder: DatasetBuilder, where: str, split: str) -> list[tuple[Path, str]] | None:
    """Return the files of one split with their kinds, if ``data_files`` can read all of them.

    None if it cannot, or if the dataset card sets special options.

    Raises:
        DataError: There is no such split.
    """
    files = getattr(builder.config, "data_files", None)
    is_special = getattr(builder.config, "field", None) is not None  # rows within a JSON object
    if not files or is_special or split == "all":
        return None
    if split not in files:
        raise _no_split(where, split, list(files))
    addresses = [str(address) for address in files[split]]
    if not all(kind_of_file(address) in FILE_KINDS for address in addresses):
        return None
    local = DownloadManager().download(addresses)  # local paths are not changed
    return [(Path(p), kind_of_file(address)) for p, address in zip(local, addresses, strict=True)]


def _rows_of(name: str, subset: str | None, split: str) -> list[Row]:
    """Return the rows of a split of a folder of data files or a hub id.

    As in ``datasets``: also ``train[:100]``, sums such as ``train+validation``, and ``all``.
    """
    builder = load_dataset_builder(name, subset)
    if split == "all":
        split = "+".join(map(str, getattr(builder.config, "data_files", None) or [split]))
    parts = dict.fromkeys(part.partition("[")[0].strip() for part in split.split("+"))
    files = {part: _own_files(builder, name, part) for part in parts}
    if None in files.values():
        return rows_of_dataset(load_dataset(name, subset, split=split))
    named = getattr(builder.config, "sep", ",")  # from the dataset card
    delimiter = None if named == "," else named
    rows = {
        part: [row for path, kind in own or () for row in read_file(path, kind, delimiter)]
        for part, own in files.items()
    }
    lengths = {part: len(own) for part, own in rows.items()}
    cuts = ReadInstruction.from_spec(split).to_absolute(lengths)
    return [row for cut in cuts for row in rows[cut.splitname][cut.from_ : cut.to]]


def read_folder(folder: Path, *, split: str, subset: str | None) -> list[Row]:
    """Return the rows of a folder made by ``save_to_disk``, or of a folder of data files.

    Args:
        folder: An existing folder.
        split: Split of a saved ``DatasetDict`` or of a folder of data files; a saved ``Dataset``
            has none.
        subset: Configuration of a folder of data files.

    Raises:
        DataError: The folder is neither, is broken, or lacks the split.
    """
    try:
        if not _is_saved(folder):
            return _rows_of(str(folder), subset, split)
        found = load_from_disk(str(folder))
    except DataError:
        raise
    except (*_READ_ERRORS, AttributeError, LookupError, TypeError) as error:  # of its JSON files
        raise DataError(
            f"{folder}: not a folder that `datasets` can read ({_first_line(error)}); expected one "
            f"made by Dataset.save_to_disk, or data files with a split {split!r}; "
            "or name a .jsonl file"
        ) from error
    if isinstance(found, DatasetDict):
        return rows_of_splits(found, split=split, where=str(folder))
    return rows_of_dataset(found)


def read_hub(hub_id: str, *, split: str, subset: str | None) -> list[Row]:
    """Return the rows of one split of a dataset on the Hugging Face Hub (or in its local cache).

    Raises:
        DataNotFoundError: The Hub has no such dataset or cannot be reached.
        DataError: The dataset has no such split or subset, or cannot be read.
    """
    try:
        return _rows_of(hub_id, subset, split)
    except DataError:
        raise
    except OSError as error:
        raise DataNotFoundError(
            f"data set {hub_id!r}: no such file or folder here, and not available from the Hugging "
            f"Face Hub ({_first_line(error)}); check the spelling and the network, "
            "or give the path of a .jsonl file"
        ) from error
    except _READ_ERRORS as error:
        raise DataError(
            f"data set {hub_id!r}, split {split!r}, subset {subset!r}: cannot be read "
            f"({_first_line(error)}); check the names of the split and the subset"
        ) from error
