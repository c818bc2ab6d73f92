"""Entries of a teacher's cache, and the runs that write them.

Frozen here: a second run never loads the teacher, and the first one lets it go; other data,
teachers, k or precision are other entries; broken files are written again, and a killed writer
continues where it was.
"""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
import tiny
from cache_training import ROWS, VAL, entries, train

from okd_lightning.callbacks import (
    KD,
)
from okd_lightning.errors import CacheError


def test_the_teacher_is_let_go_and_not_loaded_again(
    tmp_path, make_module, cache, loaded, recwarn, caplog
):
    caplog.set_level("INFO")
    first, module = train(tmp_path, make_module, [KD()], k=5, cache=cache, val=VAL)
    gc.collect()
    assert module.teacher is None
    assert [teacher() for teacher in loaded] == [None]
    assert "written to its cache, 5 ids per token" in caplog.text
    caplog.clear()
    second, _ = train(tmp_path, make_module, [KD()], k=5, cache=cache, val=VAL)
    assert len(loaded) == 1
    assert "read from its cache" in caplog.text
    assert second.losses == first.losses
    assert not [w for w in recwarn if "cache" in str(w.message)]


def test_whatever_changes_what_it_says_is_another_entry(
    tmp_path, make_module, cache, loaded, tiny_tokenizer
):
    def new_entries(**settings) -> int:
        before = entries(cache)
        train(tmp_path, make_module, [KD()], **{"k": 5, "cache": cache, **settings})
        return len(entries(cache) - before)

    other = tmp_path / "other"
    tiny.make_llama(9, tiny.TEACHER_ROWS).save_pretrained(other)
    tiny_tokenizer.save_pretrained(other)
    changed = [dict(ROWS[0], response=ROWS[0]["response"] + "a"), *ROWS[1:]]
    assert new_entries() == 1
    assert new_entries() == 0
    assert new_entries(rows=changed) == 1
    assert new_entries(data={"max_response_length": 3}) == 1
    assert new_entries(k=6) == 1
    assert new_entries(dtype="float16") == 1
    assert new_entries(model={"teacher": str(other)}) == 1
    assert new_entries(model={"teacher_dtype": "bfloat16"}) == 1
    assert new_entries(precision="bf16-mixed") == 1
    tiny.make_llama(10, tiny.TEACHER_ROWS).save_pretrained(other)  # in the same place
    assert new_entries(model={"teacher": str(other)}) == 1
    assert new_entries(model={"teacher": str(other)}) == 0
    num_loaded = len(loaded)
    assert new_entries(val=VAL) == 1  # the validation set has one of its own
    assert new_entries() == 0
    assert len(loaded) == num_loaded + 1


def test_a_teacher_that_moves_or_is_in_memory_is_the_same_one(
    tmp_path, make_module, cache, loaded, teacher_folder
):
    train(tmp_path, make_module, [KD()], k=5, cache=cache)
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in teacher_folder.iterdir():
        (moved / path.name).write_bytes(path.read_bytes())
    train(tmp_path, make_module, [KD()], k=5, cache=cache, model={"teacher": str(moved)})
    assert len(loaded) == 1
    in_memory = {"teacher": tiny.make_llama(2, tiny.TEACHER_ROWS)}
    for _ in range(2):
        train(tmp_path, make_module, [KD()], k=5, cache=cache, model=in_memory)
    assert len(loaded) == 2
    assert len(entries(cache)) == 2


def test_a_broken_file_is_written_again_and_said(tmp_path, make_module, cache, loaded):
    expected, _ = train(tmp_path, make_module, [KD()], k=5, cache=cache)
    files = sorted(cache.glob("*/part-*.npy"))
    assert len(files) > 3
    untouched = files[0].stat().st_mtime_ns
    files[1].write_bytes(files[1].read_bytes()[:-2])
    with pytest.warns(UserWarning, match=r"part-00001.npy is missing or cut short: .* again"):
        found, _ = train(tmp_path, make_module, [KD()], k=5, cache=cache)
    assert len(loaded) == 2
    assert found.losses == expected.losses
    assert files[0].stat().st_mtime_ns == untouched
    content = bytearray(files[1].read_bytes())
    content[-1] ^= 1
    files[1].write_bytes(content)
    with pytest.raises(CacheError, match="is not what was written there; delete it"):
        train(tmp_path, make_module, [KD()], k=5, cache=cache)


class Killed(Exception):
    """Exception that ends a run in the middle."""


def test_a_killed_writer_continues_where_it_was(tmp_path, make_module, cache, monkeypatch):
    expected, _ = train(tmp_path, make_module, [KD()], k=5, cache=tmp_path / "whole")
    replaced: list[Path] = []
    original = os.replace

    def replace(source: Path, target: Path) -> None:
        if "part-" in source.name:
            if len(replaced) == 3:
                raise Killed
            replaced.append(target)
        original(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(Killed):
            train(tmp_path, make_module, [KD()], k=5, cache=cache)
    assert not entries(cache)
    assert len(list(cache.glob("*/part-*.npy"))) == 3
    stamps = [path.stat().st_mtime_ns for path in replaced]
    found, _ = train(tmp_path, make_module, [KD()], k=5, cache=cache)
    assert [path.stat().st_mtime_ns for path in replaced] == stamps
    assert found.losses == expected.losses
    assert not list(cache.glob("*/.*.new"))
