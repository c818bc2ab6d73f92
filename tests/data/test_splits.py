"""Splits of a folder of data files, named as ``datasets`` names them.

Frozen here: parts, sums and ``all`` give the rows in the order of ``datasets``, with every cell as
its file has it.
"""

from __future__ import annotations

import datasets
import pytest

from okd_lightning.data import load_rows
from okd_lightning.errors import DataError


@pytest.fixture
def folder(tmp_path):
    for split, first in (("train", 0), ("test", 10)):
        lines = [f"{number:03},{number + 0.5:.2f}" for number in range(first, first + 6)]
        (tmp_path / f"{split}.csv").write_text("\n".join(["prompt,response", *lines]))
    return tmp_path


@pytest.mark.parametrize(
    ("split", "numbers"),
    [
        ("train", [0, 1, 2, 3, 4, 5]),
        ("train[:2]", [0, 1]),
        ("train[-1:]", [5]),
        ("train[50%:]", [3, 4, 5]),
        ("train[:2]+train[3:4]", [0, 1, 3]),
        ("test[:1]+train[:1]", [10, 0]),
        ("all", [0, 1, 2, 3, 4, 5, 10, 11, 12, 13, 14, 15]),
    ],
)
def test_rows_are_those_of_datasets_and_cells_stay_text(folder, split, numbers):
    rows = load_rows(str(folder), split=split)
    assert [row["prompt"] for row in rows] == [f"{number:03}" for number in numbers]
    assert rows[0]["response"] == f"{numbers[0] + 0.5:.2f}"
    theirs = datasets.load_dataset(str(folder), split=split)
    assert [int(row["prompt"]) for row in rows] == theirs["prompt"][:]


@pytest.mark.parametrize("split", ["train[:2]+dev", "dev[:1]", "train[:2"])
def test_a_wrong_one_is_one_line(folder, split):
    with pytest.raises(DataError, match="split"):
        load_rows(str(folder), split=split)
