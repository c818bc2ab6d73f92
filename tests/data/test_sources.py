"""Semantics frozen here: every source gives the same rows; what is missing or broken is one line.

A hub id is asked of the Hub only where nothing of that name exists and it cannot be a path.
"""

from __future__ import annotations

import json

import pytest
from datasets import Dataset, DatasetDict
from datasets.exceptions import DatasetNotFoundError

from okd_lightning.data import arrow, describe_source, load_rows
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
    "saved Dataset": save_dataset,
    "saved DatasetDict": save_splits,
    "list": lambda path: ROWS,
    "tuple": lambda path: tuple(ROWS),
    "Dataset": lambda path: Dataset.from_list(ROWS),
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


def test_the_callers_rows_are_not_touched():
    given = [{"prompt": "a"}]
    load_rows(given)[0]["prompt"] = "b"
    assert given == [{"prompt": "a"}]


@pytest.mark.parametrize(
    "name", ["train.jsonl", "./train", "~nobody/train", "a/b/c", "set.parquet"]
)
def test_a_missing_path_is_not_taken_for_a_hub_id(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(arrow, "load_dataset", lambda *a, **k: pytest.fail("asked the Hub"))
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


BROKEN_FILES = {
    "empty": ("a.jsonl", b"", ["no rows"]),
    "blank": ("a.jsonl", b"\n \n", ["no rows"]),
    "empty json": ("a.json", b"", ["no rows"]),
    "empty list": ("a.json", b"[]", ["no rows"]),
    "broken line": ("a.jsonl", b'{"prompt": "a"}\n\n{"prompt": \n', ["line 3", "not valid JSON"]),
    "a list a line": ("a.jsonl", b'["a"]\n', ["line 1", "a list", ".json file"]),
    "a string a line": ("a.jsonl", b'{}\n"a"\n', ["line 2", "a string", "JSON object"]),
    "a number a line": ("a.jsonl", b"3\n", ["line 1", "a number"]),
    "null a line": ("a.jsonl", b"null\n", ["line 1", "null"]),
    "lines called json": ("a.json", b'{"a": 1}\n{"a": 2}\n', ["line 2", "name it .jsonl"]),
    "an object": ("a.json", b'{"data": []}', ["an object", "list of JSON objects"]),
    "a list of strings": ("a.json", b'[{}, "a"]', ["row 2", "a string"]),
    "latin-1": ("a.jsonl", '{"prompt": "Grüße"}'.encode("latin-1"), ["not UTF-8"]),
    "csv": ("a.csv", b"prompt\na\n", ["'.csv'", ".jsonl"]),
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
    def load_dataset(path, name, split):
        raise raised

    monkeypatch.setattr(arrow, "load_dataset", load_dataset)
    with pytest.raises(DataError) as error:
        load_rows("openai/gsm8k", split="x")
    assert type(error.value) is expected
    assert error.value.__cause__ is raised
    assert_one_line(error, "'openai/gsm8k'", *words)


def test_a_hub_id_is_asked_for_with_subset_and_split(monkeypatch):
    def load_dataset(path, name, split):
        return Dataset.from_list([{"path": path, "name": name, "split": split}])

    monkeypatch.setattr(arrow, "load_dataset", load_dataset)
    rows = load_rows("openai/gsm8k", split="test", subset="main")
    assert rows == [{"path": "openai/gsm8k", "name": "main", "split": "test"}]


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
