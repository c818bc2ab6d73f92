"""Semantics frozen here: a broken file or folder is refused by name and place, in one line.

Files that expand to more than memory are refused before they are read.
"""

from __future__ import annotations

import gzip

import pyarrow
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from okd_lightning import bounded_files
from okd_lightning.data import load_rows
from okd_lightning.errors import DataError

ROWS = [{"prompt": "1 + 1 =", "response": " 2"}, {"prompt": "Grüße\n", "response": "\u2028"}]


def save_dataset(path):
    Dataset.from_list(ROWS).save_to_disk(path)
    return path


def assert_one_line(error, *words):
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


BROKEN_FILES = {
    "empty": ("a.jsonl", b"", ["no rows"]),
    "blank": ("a.jsonl", b"\n \n", ["no rows"]),
    "empty json": ("a.json", b"", ["no rows"]),
    "empty list": ("a.json", b"[]", ["no rows"]),
    "broken line": ("a.jsonl", b'{"prompt": "a"}\n\n{"prompt": \n', ["line 3", "not valid JSON"]),
    "a list a line": ("a.jsonl", b'["a"]\n', ["line 1", "a list", ".json file"]),
    "a string a line": ("a.jsonl", b'{}\n"a"\n', ["line 2", "a string", "JSON object"]),
    "a number per line": ("a.jsonl", b"3\n", ["line 1", "a number"]),
    "null a line": ("a.jsonl", b"null\n", ["line 1", "null"]),
    "a list called jsonl": ("a.jsonl", b"[\n{}\n]", ["line 1", "belongs in a .json file"]),
    "pretty objects": ("a.jsonl", b'{\n"a": 1\n}', ["line 1", "each row on one line"]),
    "broken lines called json": ("a.json", b'{"a": 1}\n{"a": \n', ["line 2", "not valid JSON"]),
    "an object": ("a.json", b'{"data": []}', ["an object", "list of JSON objects", "'data'"]),
    "a list of strings": ("a.json", b'[{}, "a"]', ["row 2", "a string"]),
    "latin-1": (
        "a.jsonl",
        b'{"prompt": "a"}\n' + '{"prompt": "Grüße"}'.encode("latin-1"),
        ["line 2", "not UTF-8", "iconv"],
    ),
    "latin-1 csv": ("a.csv", "prompt\nGrüße\n".encode("latin-1"), ["line 2", "not UTF-8"]),
    "utf-16": ("a.jsonl", '{"prompt": "a"}'.encode("utf-16"), ["UTF-16", "iconv"]),
    "utf-16 csv": ("a.csv", "prompt\na\n".encode("utf-16"), ["UTF-16"]),
    "no gzip": ("a.jsonl.gz", b'{"prompt": "a"}', ["gzip"]),
    "half a gzip": ("a.jsonl.gz", gzip.compress(b'{"prompt": "a"}')[:-9], ["gzip"]),
    "empty csv": ("a.csv", b"", ["no rows"]),
    "csv of a header": ("a.csv", b"prompt,response\n\n", ["no rows"]),
    "too few cells": ("a.csv", b"a,b\n1,2\n\n1\n", ["line 4", "1 cells", "2 columns"]),
    "too many cells": ("a.csv", b"a,b\n1,2,3\n", ["line 2", "3 cells", "quote"]),
    "an open quote": ("a.csv", b'a,b\n1,"2\n', ["line 2", "not valid CSV"]),
    "a quote within": ("a.csv", b'a,b\n1,"2"3\n', ["line 2", "not valid CSV"]),
    "semicolons": ("a.csv", b"prompt;response\na;b\n", ["semicolons", "commas"]),
    "tabs": ("a.csv", b"prompt\tresponse\na\tb\n", ["tabs", "name it .tsv"]),
    "commas": ("a.tsv", b"prompt,response\na,b\n", ["commas", "name it .csv"]),
    "a name twice": ("a.csv", b"prompt,prompt\na,b\n", ["'prompt' twice"]),
    "no parquet": ("a.parquet", b"PAR1", ["not a Parquet file"]),
    "xlsx": ("a.xlsx", b"PK", ["'.xlsx'", ".csv", ".jsonl"]),
    "no suffix": ("a", b"{}", ["no suffix", ".jsonl"]),
}


@pytest.mark.parametrize(("name", "content", "words"), BROKEN_FILES.values(), ids=BROKEN_FILES)
def test_a_broken_file_is_refused_by_name_and_place(name, content, words, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        load_rows(tmp_path / name)
    assert_one_line(error, str(tmp_path / name), *words)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ([], ["rows in memory", "no rows"]),
        ([{"prompt": "a"}, "b"], ["rows in memory", "row 2", "str", "mapping"]),
        ("", ["empty name"]),
        (3, ["int", "path"]),
        ({"train": []}, ["dict", "list of mappings"]),
        (iter([{"prompt": "a"}]), ["iterator", "list(...)"]),
        (Dataset.from_list(ROWS).to_iterable_dataset(), ["IterableDataset", "list(...)"]),
        (Dataset.from_list(ROWS).to_pandas(), ["DataFrame", "to_dict('records')"]),
        (DatasetDict({"a": Dataset.from_list(ROWS)}), ["no split 'train'", "'a'"]),
    ],
)
def test_what_is_no_source_is_refused(source, words):
    with pytest.raises(DataError) as error:
        load_rows(source)
    assert_one_line(error, *words)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(DataError) as error:
        load_rows(tmp_path)
    assert_one_line(error, str(tmp_path), "save_to_disk")


def test_a_broken_saved_folder_is_refused(tmp_path):
    save_dataset(tmp_path / "rows")
    (tmp_path / "rows" / "state.json").write_text("{")
    with pytest.raises(DataError) as error:
        load_rows(tmp_path / "rows")
    assert_one_line(error, "rows", "not a folder that `datasets` can read")


@pytest.mark.parametrize("name", ["state.json", "dataset_dict.json"])
def test_a_saved_folder_of_other_json_is_refused(name, tmp_path):
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / name).write_text('{"splits": 7, "_data_files": 7}')
    with pytest.raises(DataError) as error:
        load_rows(tmp_path / "rows")
    assert_one_line(error, "rows", "not a folder that `datasets` can read")


def _nested(texts: pyarrow.Array) -> pyarrow.Array:
    return pyarrow.ListArray.from_arrays([0, len(texts)], texts)


TEXTS = pyarrow.array(["a" * (1 << 16)] * 1000)  # 64 MiB
HUGE = {
    "a repeated text": TEXTS,
    "a nested text": _nested(pyarrow.StructArray.from_arrays([TEXTS], ["content"])),
    "a text nested twice": _nested(_nested(TEXTS)),
    "a dictionary": TEXTS.dictionary_encode(),
    "nothing, often": _nested(pyarrow.nulls(20_000_000, pyarrow.int8())),
}


@pytest.mark.parametrize("name", HUGE)
def test_a_parquet_file_that_expands_to_too_much_is_refused(name, tmp_path, monkeypatch):
    """Before it is in memory: the limits are lowered, so that the test takes none either."""
    monkeypatch.setattr(bounded_files, "_UNCHECKED", 1 << 24)
    table = pyarrow.table({"prompt": HUGE[name]})
    pq.write_table(table, tmp_path / "a.parquet", compression="zstd")
    assert (tmp_path / "a.parquet").stat().st_size < 1 << 16
    before = pyarrow.total_allocated_bytes()
    with pytest.raises(DataError) as error:
        load_rows(tmp_path / "a.parquet")
    assert_one_line(error, "a.parquet", "expand to more than 16,777,216")
    assert pyarrow.total_allocated_bytes() - before < 1 << 25
