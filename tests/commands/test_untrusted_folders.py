"""Frozen here: files on disk cannot redirect a command to other folders; no other files are lost.

* labels and seeds of comparison.json are checked like those that are typed, and a broken one is one
  line; a run's folder is removed only where the comparison's mark lies in it;
* ``--out`` without a name is refused; a folder of something else is, unless --overwrite is given.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from cli_workbench import Result

from okd_lightning.checkpoints.folder_lock import folder_lock
from okd_lightning.commands.compare.entries import Entry, read_entries
from okd_lightning.commands.compare.folder import (
    MARKER,
    ComparisonFolder,
    Plan,
    RunFolder,
    comparison_lock,
)
from okd_lightning.commands.export import _check_out
from okd_lightning.errors import ConfigError, FolderInUseError, OutputError

PLAN = Plan((Entry("KD", {"method": "KD"}),), (0,), None, (), ())
GOOD = {"methods": {"KD": {"method": "KD"}}, "seeds": [0], "budget": None}
GOOD |= {"configs": [], "options": []}


@pytest.mark.parametrize("label", ["../../victim", "", "/abs", "a/b", "[/INST]\n", ".", "x" * 200])
def test_labels_from_disk_are_checked(label: str, tmp_path: Path) -> None:
    manifest = {**GOOD, "methods": {label: {"method": "KD"}}}
    (tmp_path / "comparison.json").write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match="a contender cannot be called"):
        ComparisonFolder(tmp_path, PLAN)


BROKEN = [
    {"seeds": ["0/../../x"]},
    {"seeds": [-1]},
    {"seeds": [True]},
    {"seeds": 3},
    {"methods": []},
    {"methods": {"KD": 3}},
    {"methods": {"KD": {"trainer": {"default_root_dir": "/"}}}},
    {"configs": [3]},
    {"options": [3]},
    {"budget": 7},
]


@pytest.mark.parametrize("change", BROKEN, ids=str)
def test_what_else_a_manifest_says_is_checked(change: dict, tmp_path: Path) -> None:
    (tmp_path / "comparison.json").write_text(json.dumps({**GOOD, **change}))
    with pytest.raises(ConfigError, match=r"comparison\.json"):
        ComparisonFolder(tmp_path, PLAN)


@pytest.mark.parametrize("content", ["", "{", "[]", '"x"', "\0"])
def test_a_manifest_that_is_none(content: str, tmp_path: Path) -> None:
    (tmp_path / "comparison.json").write_text(content)
    with pytest.raises(ConfigError, match=r"comparison\.json cannot be read"):
        ComparisonFolder(tmp_path, PLAN)


def test_a_typed_file_cannot_leave_the_folder(tmp_path: Path) -> None:
    path = tmp_path / "..yaml"
    path.write_text("method: KD\n")
    with pytest.raises(ConfigError, match="a contender cannot be called"):
        read_entries(str(path))


def test_only_a_marked_folder_is_removed(tmp_path: Path) -> None:
    run = RunFolder(PLAN.entries[0], 0, tmp_path / "runs" / "KD-seed0")
    run.path.mkdir(parents=True)
    (run.path / "thesis.tex").write_text("x")
    with pytest.raises(OutputError, match="was not made by this comparison"):
        run.prepare()
    assert (run.path / "thesis.tex").exists()
    (run.path / MARKER).touch()
    run.prepare()
    assert [path.name for path in run.path.iterdir()] == [MARKER]


def test_a_comparison_is_one_process(tmp_path: Path) -> None:
    with (
        folder_lock(tmp_path, "x"),
        pytest.raises(FolderInUseError, match=r"--out .* is in use by process"),
        comparison_lock(tmp_path),
    ):
        pass


def test_a_foreign_folder_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(ConfigError, match="holds files of something else"),
        comparison_lock(tmp_path),
    ):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


MODULE = SimpleNamespace(
    pair=SimpleNamespace(student_source=None, teacher=SimpleNamespace(source=None, own_sources=()))
)


@pytest.mark.parametrize(
    ("name", "kind"), [("thesis.tex", "something other than an export"), ("config.yaml", "a run")]
)
def test_export_asks_before_it_writes_among_other_files(
    name: str, kind: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text("x")
    with pytest.raises(OutputError, match=f"holds {kind}.*--overwrite"):
        _check_out(tmp_path, MODULE, overwrite=False)
    _check_out(tmp_path, MODULE, overwrite=True)
    (tmp_path / ".okd-lightning-export").touch()
    _check_out(tmp_path, MODULE, overwrite=False)
    _check_out(tmp_path / "new", MODULE, overwrite=False)


@pytest.mark.parametrize("out", ["", " ", "a\0b"])
@pytest.mark.parametrize(
    "command",
    [["export", "--ckpt_path", "x", "--out"], ["compare", "--methods", "KD", "--out"]],
    ids=lambda words: words[0],
)
def test_a_folder_has_a_name(
    command: list[str], out: str, okd: Callable[..., Result], here: Path
) -> None:
    result = okd(*command, out)
    assert result.status == 2
    assert "expected the name of a folder to write" in result.err
    assert not list(here.iterdir())
