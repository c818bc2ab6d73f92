"""Files and texts of others within limits.

Frozen here: pipes, devices and large files are refused before they are read; JSON and YAML that
Python refuses with errors of its own are errors of the caller's class; YAML aliases are counted
with the values to which they expand, before anything is built; gzip files that grow without measure
are refused, and of several members all are read. A key that YAML gives twice is refused.
"""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import pytest
import yaml

from okd_lightning import bounded_files
from okd_lightning.bounded_files import check_yaml, decompressed, load_yaml, parse_json, read_json
from okd_lightning.errors import ConfigError, DataError


def test_what_is_not_a_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, word in ((tmp_path / "pipe", "a pipe"), (Path("/dev/zero"), "a device")):
        with pytest.raises(ConfigError, match=f"--x: {word} where a file is expected"):
            read_json(path, ConfigError, "--x")
    with pytest.raises(ConfigError, match="a folder where a file"):
        read_json(tmp_path, ConfigError, "--x")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_json(tmp_path / "none", ConfigError, "--x")


def test_a_large_file_is_refused(tmp_path):
    with (tmp_path / "large").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(DataError, match="more than 64 MiB"):
        read_json(tmp_path / "large", DataError, "x")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "line 1, character 2"),
        ("[" * 100_000, "nested too deeply"),
        ("9" * 5000, "more than 4300 digits"),
        (b"\xff", "not UTF-8"),
    ],
)
def test_json(text, words):
    with pytest.raises(DataError, match=words):
        parse_json(text, DataError, "x")
    assert parse_json('{"a": 1}', DataError, "x") == {"a": 1}


LEVELS = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)]
LAUGHS = "a0: &a0 [x]\n" + "".join(LEVELS)
MERGES = LAUGHS.replace("[x]", "{x: 1}").replace(" [*", " {<<: [*").replace("]\n", "]}\n")


@pytest.mark.parametrize("text", [LAUGHS, MERGES, "a: &a [*a]", "[" * 3000, "a: " + "9" * 5000])
def test_yaml_expands_to_a_limited_number_of_values(text):
    with pytest.raises(yaml.YAMLError):
        load_yaml(text)


@pytest.mark.parametrize(
    "text", ["a: 1\nb: 2\na: 3", "x: {a: 1, a: 1}", "- {a: 1}\n- {a: 1, a: 2}"]
)
def test_a_key_of_yaml_is_given_once(text):
    with pytest.raises(yaml.MarkedYAMLError, match="'a' a second time; join both"):
        load_yaml(text)


def test_another_loader_is_guarded():
    with pytest.raises(yaml.YAMLError, match="expand to more than"):
        check_yaml(LAUGHS)
    check_yaml("a: &a [1]\nb: *a")
    assert load_yaml("a: &a {x: 1}\nb: {<<: *a, y: 2}") == {"a": {"x": 1}, "b": {"x": 1, "y": 2}}


def test_gzip_members_are_joined_and_bombs_refused(monkeypatch):
    members = gzip.compress(b"one ") + gzip.compress(b"two") + b"\0\0"
    assert decompressed(members) == b"one two"
    with pytest.raises(EOFError):
        decompressed(gzip.compress(b"x" * 1000)[:-4])
    monkeypatch.setattr(bounded_files, "_UNCHECKED", 1 << 20)
    with pytest.raises(OverflowError, match="bytes that expand to more than"):
        decompressed(gzip.compress(b" " * (8 << 20)))
