"""Semantics frozen here: every source gives the same rows; what is missing or broken is one line.

The Hub is queried only where no file of that name exists and the text cannot be a path.
"""

from __future__ import annotations

import csv
import gzip
import json
from types import SimpleNamespace

import pandas
import pyarrow
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, DatasetDict
from datasets.exceptions import DatasetNotFoundError

from okd_lightning.data import RolloutDataModule, arrow, describe_source, load_rows
from okd_lightning.errors import DataError, DataNotFoundError

ROWS = [{"prompt": "1 + 1 =", "response": " 2"}, {"prompt": "Grüße\n", "response": "\u2028"}]


def write_jsonl(path, rows=ROWS):
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), "utf-8")
    return path


def save_dataset(path):
    Dataset.from_list(ROWS).save_to_disk(path)
    return path


def save_splits(path):
    other = Dataset.from_list(ROWS[:1])
    DatasetDict({"train": Dataset.from_list(ROWS), "val": other}).save_to_disk(path)
    return path


def write_lines_called_json(path):
    return write_jsonl(path.with_suffix(".json"))  # as Dataset.to_json does


def write_gzip(path):
    path = path.with_suffix(".jsonl.gz")
    path.write_bytes(gzip.compress(write_jsonl(path.with_suffix("")).read_bytes()))
    return path


def write_csv(path, suffix=".csv", delimiter=",", encoding="utf-8", end="\r\n"):
    path = path.with_suffix(suffix)
    with path.open("w", encoding=encoding, newline="") as file:
        writer = csv.DictWriter(file, ROWS[0], delimiter=delimiter, lineterminator=end)
        writer.writeheader()
        writer.writerows(ROWS)
        file.write(end * 2)
    return path


def write_csv_gzip(path):
    path = write_csv(path)
    path.with_suffix(".csv.gz").write_bytes(gzip.compress(path.read_bytes()))
    return path.with_suffix(".csv.gz")


def write_parquet(path):
    Dataset.from_list(ROWS).to_parquet(path.with_suffix(".parquet"))
    return path.with_suffix(".parquet")


class Rows:
    """Minimal map-style dataset."""

    def __len__(self):
        return len(ROWS)

    def __getitem__(self, index):
        return ROWS[index]  # raises beyond the end, as torch's own do


class TorchRows(Rows, torch.utils.data.Dataset):
    """Dataset class as usually written for a DataLoader."""


def write_list(path):
    path = path.with_suffix(".json")
    path.write_text(json.dumps(ROWS, indent=2), "utf-8")
    return path


def write_with_blank_lines_and_bom(path):
    path = path.with_suffix(".jsonl")
    lines = [json.dumps(ROWS[0]), "", json.dumps(ROWS[1]), "  ", ""]
    path.write_text("\ufeff" + "\r\n".join(lines), "utf-8")
    return path


SOURCES = {
    "jsonl": lambda path: write_jsonl(path.with_suffix(".jsonl")),
    "jsonl as str": lambda path: str(write_jsonl(path.with_suffix(".jsonl"))),
    "jsonl with blank lines, CRLF and BOM": write_with_blank_lines_and_bom,
    "json": write_list,
    "json, an object per line": write_lines_called_json,
    "jsonl.gz": write_gzip,
    "csv": write_csv,
    "csv with BOM and LF": lambda path: write_csv(path, encoding="utf-8-sig", end="\n"),
    "CSV": lambda path: write_csv(path, ".CSV"),
    "csv.gz": write_csv_gzip,
    "tsv": lambda path: write_csv(path, ".tsv", "\t"),
    "parquet": write_parquet,
    "saved Dataset": save_dataset,
    "saved DatasetDict": save_splits,
    "list": lambda path: ROWS,
    "tuple": lambda path: tuple(ROWS),
    "Dataset": lambda path: Dataset.from_list(ROWS),
    "DatasetDict": lambda path: DatasetDict(
        {"train": Dataset.from_list(ROWS), "test": Dataset.from_list(ROWS[:1])}
    ),
    "map-style": lambda path: Rows(),
    "torch Dataset": lambda path: TorchRows(),
    "torch Subset": lambda path: torch.utils.data.Subset(TorchRows(), [0, 1]),
}


def assert_one_line(error, *words):
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


@pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES)
def test_every_source_gives_the_same_rows(make, tmp_path):
    assert load_rows(make(tmp_path / "rows"), split="train") == ROWS


def test_the_split_is_chosen(tmp_path):
    assert load_rows(save_splits(tmp_path / "rows"), split="val") == ROWS[:1]


def test_a_missing_split_names_those_found(tmp_path):
    with pytest.raises(DataError) as error:
        load_rows(save_splits(tmp_path / "rows"), split="test")
    assert_one_line(error, "rows", "no split 'test'", "'train', 'val'")


def test_a_folder_of_data_files_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    write_jsonl(tmp_path / "set" / "train.jsonl")
    assert load_rows(tmp_path / "set", split="train") == ROWS


def test_fields_that_arrow_fills_with_null_are_absent_but_cells_stay(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": "a"}], "tag": None},
        {"messages": [{"role": "assistant", "tool_calls": [{"name": "f"}]}], "tag": "x"},
    ]
    Dataset.from_list(rows).save_to_disk(tmp_path / "rows")
    assert load_rows(tmp_path / "rows") == rows


def test_rows_of_a_frame_have_lists_where_pandas_has_arrays(tmp_path):
    messages = [{"role": "user", "content": "a", "calls": [{"b": [1]}]}]
    Dataset.from_list([{"messages": messages}]).to_parquet(tmp_path / "rows.parquet")
    frame = pandas.read_parquet(tmp_path / "rows.parquet")
    assert not isinstance(frame["messages"][0], list)
    assert load_rows(frame.to_dict("records")) == [{"messages": messages}]


def test_the_callers_rows_are_not_touched():
    given = [{"prompt": "a"}]
    load_rows(given)[0]["prompt"] = "b"
    assert given == [{"prompt": "a"}]


@pytest.mark.parametrize(
    "name", ["train.jsonl", "./train", "~nobody/train", "a/b/c", "set.parquet"]
)
def test_a_missing_path_is_not_taken_for_a_hub_id(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(arrow, "load_dataset_builder", lambda *a, **k: pytest.fail("asked the Hub"))
    with pytest.raises(DataNotFoundError) as error:
        load_rows(name)
    assert_one_line(error, "no such file")
    assert isinstance(error.value, FileNotFoundError)


def test_a_missing_file_offers_near_names(tmp_path):
    write_jsonl(tmp_path / "train.jsonl")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(DataNotFoundError) as error:
        load_rows(tmp_path / "trian.jsonl")
    assert_one_line(error, "trian.jsonl", str(tmp_path), "did you mean 'train.jsonl'?")
    assert "notes" not in str(error.value)


def test_a_missing_file_without_near_names_offers_the_data_files(tmp_path):
    write_jsonl(tmp_path / "gsm.jsonl")
    with pytest.raises(DataNotFoundError) as error:
        load_rows(tmp_path / "zzzzzzzz.jsonl")
    assert_one_line(error, "'gsm.jsonl'")


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(DataNotFoundError) as error:
        load_rows(tmp_path / "nowhere" / "train.jsonl")
    assert_one_line(error, f"no folder {tmp_path / 'nowhere'}")


def test_texts_of_a_parquet_dictionary_are_read(tmp_path):
    """pandas writes categorical columns as dictionaries; batches are shorter than the file."""
    texts = ["a" * 1000, "b"] * 3000
    table = pyarrow.table({"prompt": pyarrow.array(texts).dictionary_encode()})
    pq.write_table(table, tmp_path / "a.parquet")
    assert load_rows(tmp_path / "a.parquet") == [{"prompt": text} for text in texts]


@pytest.mark.parametrize(
    ("raised", "expected", "words"),
    [
        (ConnectionError("Couldn't reach 'a/b' on the Hub\ntrace"), DataNotFoundError, ["network"]),
        (DatasetNotFoundError("'a/b' doesn't exist"), DataNotFoundError, ["spelling"]),
        (ValueError('Unknown split "x".'), DataError, ["Unknown split", "split 'x'"]),
        (RuntimeError("scripts are no longer supported"), DataError, ["scripts are no longer"]),
    ],
    ids=["unreachable", "unknown", "split", "script"],
)
def test_what_the_hub_refuses_is_one_line(raised, expected, words, monkeypatch):
    def load_dataset_builder(path, name):
        raise raised

    monkeypatch.setattr(arrow, "load_dataset_builder", load_dataset_builder)
    with pytest.raises(DataError) as error:
        load_rows("openai/gsm8k", split="x")
    assert type(error.value) is expected
    assert error.value.__cause__ is raised
    assert_one_line(error, "'openai/gsm8k'", *words)


def test_a_hub_id_is_asked_for_with_subset_and_split(monkeypatch):
    def load_dataset(path, name, split):
        return Dataset.from_list([{"path": path, "name": name, "split": split}])

    def load_dataset_builder(path, name):
        return SimpleNamespace(config=SimpleNamespace(data_files={"test": ["rows.arrow"]}))

    monkeypatch.setattr(arrow, "load_dataset_builder", load_dataset_builder)
    monkeypatch.setattr(arrow, "load_dataset", load_dataset)
    rows = load_rows("openai/gsm8k", split="test", subset="main")
    assert rows == [{"path": "openai/gsm8k", "name": "main", "split": "test"}]


EXACT = {
    "prompt": ["007", "NA", "2024-01-02", " a\r\nb ", "1e5"],
    "response": ["1.50", "null", "2024-01-02T03:04:05Z", 'say "x", y', "True"],
    "note": ["", "nan", "N/A", "-0", "1_000"],
}
EXACT_ROWS = [dict(zip(EXACT, cells, strict=True)) for cells in zip(*EXACT.values(), strict=True)]


def write_exact(folder, kind):
    path = folder / f"train{kind}"
    if kind == ".parquet":
        Dataset.from_list(EXACT_ROWS).to_parquet(path)
    elif kind in (".csv", ".tsv"):
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, EXACT, delimiter="," if kind == ".csv" else "\t")
            writer.writeheader()
            writer.writerows(EXACT_ROWS)
    elif kind == ".json":
        path.write_text(json.dumps(EXACT_ROWS))
    else:
        write_jsonl(path, EXACT_ROWS)
    return path


@pytest.mark.parametrize("is_folder", [False, True], ids=["file", "folder"])
@pytest.mark.parametrize("kind", [".csv", ".tsv", ".json", ".jsonl", ".parquet"])
def test_no_cell_is_interpreted(kind, is_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    path = write_exact(tmp_path / "set", kind)
    assert load_rows(path.parent if is_folder else path) == EXACT_ROWS


def test_files_of_a_hub_id_are_read_as_local_ones(tmp_path, monkeypatch):
    paths = [write_exact(tmp_path, kind) for kind in (".csv", ".jsonl")]
    local = {f"hf://datasets/a/b@1/{path.name}": str(path) for path in paths}

    class Downloads:
        def download(self, addresses):
            return [local[address] for address in addresses]

    files = {"train": list(local), "test": []}
    builder = SimpleNamespace(config=SimpleNamespace(data_files=files))
    monkeypatch.setattr(arrow, "load_dataset_builder", lambda path, name: builder)
    monkeypatch.setattr(arrow, "DownloadManager", Downloads)
    assert load_rows("a/b") == EXACT_ROWS * 2
    assert load_rows("a/b", split="train[1:3]") == EXACT_ROWS[1:3]
    with pytest.raises(DataError) as error:
        load_rows("a/b", split="validation")
    assert_one_line(error, "a/b: no split 'validation'", "'train', 'test'", "--data.val_split")


def test_a_long_cell_is_read(tmp_path):
    (tmp_path / "a.csv").write_text("prompt\n" + "a" * 200_000)
    assert load_rows(tmp_path / "a.csv") == [{"prompt": "a" * 200_000}]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"test": None, "predict": None}),
        ({"val": ["v"]}, {"test": ["v"], "predict": ["v"]}),
        ({"val": ["v"], "test": []}, {"test": [], "predict": []}),
        ({"val": ["v"], "test": ["t"], "predict": []}, {"test": ["t"], "predict": []}),
    ],
)
def test_an_empty_set_is_not_replaced_by_another(given, expected):
    sources = RolloutDataModule([{"prompt": "a"}], **given).sources
    assert {name: sources[name] for name in expected} == expected


def test_sources_are_named_in_messages():
    assert describe_source("openai/gsm8k") == "openai/gsm8k"
    assert describe_source([{"prompt": "a"}]) == "rows in memory"


@pytest.mark.parametrize(
    ("name", "count"),
    [("tinystories/train", 2116), ("tinystories/val", 200), ("gsm8k/test", 1319)],
)
def test_real_files_are_read_whole(name, count, shared_data):
    rows = load_rows(shared_data / "datasets" / f"{name}.jsonl")
    assert len(rows) == count
    assert all(isinstance(text, str) and text for row in rows for text in row.values())
