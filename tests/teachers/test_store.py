"""Format of a teacher's cache on disk.

Frozen here: at most 300 bytes per token at the default k; the ids are chosen, and the rest summed,
before rounding, so that ties cost nothing and the rest is never negative; what is read back sums
to one; an entry without its index is not whole; files that are cut, missing, of another type or
not what was written are noticed; a full disk is refused before anything is written; two runs may
write one entry at the same time.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from okd_lightning import durable_files
from okd_lightning.durable_files import require_writable
from okd_lightning.errors import CacheError, OutputError
from okd_lightning.losses.outcomes import unpack_drawn, unpack_outcomes
from okd_lightning.records.batches import Example
from okd_lightning.teachers import CachedTeacher
from okd_lightning.teachers.layout import layout_of, reading_key
from okd_lightning.teachers.store import Entry, from_records, record_type, to_records

VOCAB, K = tiny.NUM_IDS, 5


@pytest.mark.parametrize(
    ("vocab_size", "dtype", "expected"),
    [
        (512, "float16", 200),
        (65_536, "float16", 200),
        (65_536, "float32", 296),
        (151_665, "float16", 296),
    ],
)
def test_bytes_a_token(vocab_size, dtype, expected):
    record = record_type(CachedTeacher("teacher", "anywhere").k, vocab_size, dtype)
    assert record.itemsize == expected
    assert record.itemsize <= 300
    ids = np.zeros(1, record)
    ids["ids"][0, 0] = vocab_size - 1
    assert ids["ids"][0, 0] == vocab_size - 1


def distributions(num: int, vocab_size: int, scale: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return (scale * torch.randn(num, vocab_size, generator=generator)).log_softmax(-1)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 30.0])  # from next to uniform to next to certain
@pytest.mark.parametrize(("dtype", "rounding"), [("float32", 2e-6), ("float16", 2e-3)])
def test_what_is_read_is_a_distribution_and_the_one_that_was_written(scale, dtype, rounding):
    logprobs = distributions(64, 1000, scale)
    targets = torch.arange(64) * 15
    packed = from_records(to_records(logprobs, targets, record_type(K, 1000, dtype)))
    ids, found = unpack_outcomes(packed)
    drawn = torch.stack([row[target] for row, target in zip(logprobs, targets, strict=True)])
    torch.testing.assert_close(unpack_drawn(packed), drawn, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.logsumexp(-1), torch.zeros(64), atol=1e-6, rtol=0)
    assert (ids == logprobs.topk(K, -1).indices).all()
    exact = logprobs.gather(-1, ids)
    torch.testing.assert_close(found[:, :K].exp(), exact.exp(), atol=rounding, rtol=0)
    rest = 1 - exact.double().exp().sum(-1)
    torch.testing.assert_close(found[:, K].exp().double(), rest, atol=rounding, rtol=0)


def test_ids_that_no_token_has_and_no_rest():
    logprobs = distributions(4, VOCAB, 1.0)
    logprobs[:, 7] = -torch.inf
    ids, found = unpack_outcomes(
        from_records(
            to_records(logprobs, torch.zeros(4).long(), record_type(VOCAB, VOCAB, "float32"))
        )
    )
    assert (found[:, VOCAB] == -torch.inf).all()
    assert (ids[:, -1] == 7).all()
    assert (found[:, VOCAB - 1] == -torch.inf).all()
    assert found[:, : VOCAB - 1].isfinite().all()


def example(prompt: tuple[int, ...], response: tuple[int, ...], teacher=()) -> Example:
    return Example(0, prompt, (False,) * len(prompt), response, "", "", teacher)


def test_rows_are_told_apart_by_what_the_teacher_reads():
    same = [example((3, 4), (5, 6)), example((3, 4), (5, 6))]
    assert len(layout_of(same, 100).places) == 1
    for other in (
        example((3,), (4, 5, 6)),  # the same ids, and another one carries loss
        example((3, 4), (5, 7)),
        example((3, 4), (5, 6), teacher=(9,)),
    ):
        assert layout_of([*same, other], 100).num_positions == 2 + len(other.response_ids)
        assert layout_of([same[0]], 100).digest != layout_of([other], 100).digest
    assert layout_of([example((3,), ())], 100).places == {}
    key = reading_key([3, 4, 5, 6], [False, False, True, True])
    assert layout_of(same, 100).places.keys() == {key}


@pytest.fixture
def entry(tmp_path) -> Entry:
    """Cache entry, complete, with three files."""
    examples = [example((3, i), (4, 5, 6)) for i in range(3, 9)]
    record = record_type(K, VOCAB, "float16")
    found = Entry(tmp_path / "entry", {"k": K}, layout_of(examples, 6), record)
    found.prepare()
    for number, part in enumerate(found.layout.parts):
        logprobs = distributions(part.num_positions, VOCAB, 2.0)
        found.write_part(number, to_records(logprobs, torch.ones(len(logprobs)).long(), record))
    assert found.state() == (False, "")
    found.finish()
    assert len(found.layout.parts) == 3
    return found


def again(entry: Entry) -> Entry:
    return Entry(entry.folder, entry.key, entry.layout, entry.record)


def test_a_whole_one_is_read(entry):
    reader = again(entry)
    reader.open()
    assert reader.state() == (True, "")
    places = list(entry.layout.places.values())
    read = np.concatenate([reader.read(place) for place in places])
    written = np.concatenate([np.load(path) for path in sorted(entry.folder.glob("part*"))])
    assert read.tobytes() == written.tobytes()
    assert len(read) == entry.layout.num_positions == 18


def damage_cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def damage_type(path):
    np.save(path, np.zeros(6, record_type(K + 1, VOCAB, "float16")))


def damage_empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [damage_cut, damage_type, damage_empty, lambda p: p.unlink()])
def test_a_file_that_is_not_as_long_as_it_was(entry, damage):
    damage(entry.folder / "part-00001.npy")
    is_whole, problem = again(entry).state()
    assert not is_whole
    assert "part-00001.npy is missing or cut short" in problem
    with pytest.raises(CacheError, match="cut short"):
        again(entry).open()


def test_a_file_that_is_not_what_was_written(entry):
    path = entry.folder / "part-00002.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    reader = again(entry)
    reader.open()
    for place in entry.layout.places.values():
        if place.part != 2:
            assert len(reader.read(place)) == 3
            continue
        with pytest.raises(CacheError, match=r"part-00002.npy is not what was written there"):
            reader.read(place)


def test_an_index_of_something_else_or_broken(entry):
    other = Entry(entry.folder, {"k": K, "teacher": "another"}, entry.layout, entry.record)
    assert other.state()[1].endswith("is of another teacher or other data")
    (entry.folder / "index.json").write_text('{"key": ')
    assert again(entry).state()[1].endswith("is broken")


def test_no_room(entry, monkeypatch):
    usage = shutil.disk_usage(entry.folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1))
    again(entry).prepare()  # all of its files are there
    (entry.folder / "part-00001.npy").unlink()
    with pytest.raises(OutputError, match=r"the disk has 0.00 GB"):
        again(entry).prepare()


def test_a_folder_that_cannot_be_made(tmp_path, entry):
    (tmp_path / "file").touch()
    inside = Entry(tmp_path / "file" / "x", entry.key, entry.layout, entry.record)
    with pytest.raises(OutputError, match="cannot be written"):
        inside.prepare()


def test_two_runs_write_one_entry(entry, monkeypatch):
    """One run writes in between any call of the other; neither removes finished files."""
    part, index = (entry.folder / name for name in ("part-00001.npy", "index.json"))
    before = part.read_bytes()
    records = np.load(part)
    hosts = iter(("here", "there"))
    monkeypatch.setattr(durable_files.socket, "gethostname", lambda: next(hosts))
    save, touch = np.save, Path.touch

    def while_another_saves(*args, **kwargs):
        monkeypatch.setattr(np, "save", save)
        again(entry).write_part(1, records)
        save(*args, **kwargs)

    monkeypatch.setattr(np, "save", while_another_saves)
    part.unlink()
    entry.write_part(1, records)
    assert part.read_bytes() == before

    def while_another_looks(path):
        touch(path)
        path.unlink()

    monkeypatch.setattr(Path, "touch", while_another_looks)
    again(entry).prepare()
    require_writable(entry.folder, "--out")
    assert index.is_file()
    assert again(entry).state() == (True, "")


def test_what_a_killed_writer_left_goes_with_the_next(entry):
    path = entry.folder / "part-00001.npy"
    ended = subprocess.Popen(["true"])
    ended.wait()
    host = durable_files.socket.gethostname()
    left, running, elsewhere = (
        entry.folder / f".{path.name}.{middle}.new"
        for middle in (f"{host}.{ended.pid}", f"{host}.{os.getppid()}", "elsewhere.1")
    )
    for aside in (left, running, elsewhere):
        aside.write_bytes(b"half")
    entry.write_part(1, np.load(path))
    assert not left.exists()
    assert running.exists()
    assert elsewhere.exists()
