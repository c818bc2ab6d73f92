"""Two runs in one folder, started from Python.

Frozen here: a run with ``LastCheckpoint`` holds its folder from ``setup`` on, as the command line
does, so that a second one is refused before it writes anything; the folder is free after the run,
however that ends; a run without checkpoints takes no lock.
"""

from __future__ import annotations

import pytest
import tiny
from filelock import FileLock, Timeout
from lightning.pytorch.callbacks import Callback

from okd_lightning.callbacks import KD, LastCheckpoint
from okd_lightning.checkpoints.folder_lock import LOCK_FILE, folder_lock
from okd_lightning.errors import FolderInUseError


class Second(Callback):
    """Callback that tries to lock the folder in the middle of a run, and then fails on request."""

    def __init__(self, fails: bool = False) -> None:
        self.fails, self.was_held = fails, None

    def on_train_batch_end(self, trainer, *_):
        lock = FileLock(f"{trainer.default_root_dir}/{LOCK_FILE}", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            self.was_held = True
        else:
            self.was_held = False
            lock.release()
        if self.fails:
            raise RuntimeError("the run fails")


def train(folder, make_module, *callbacks):
    module = make_module()
    tiny.fit(folder, module, [KD()], tiny.make_rows(2), callbacks=callbacks, max_steps=1)


def test_a_run_holds_its_folder(tmp_path, make_module):
    second = Second()
    train(tmp_path, make_module, LastCheckpoint(), second)
    assert second.was_held
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints"]


def test_the_folder_is_free_after_a_failure(tmp_path, make_module):
    with pytest.raises(RuntimeError, match="the run fails"):
        train(tmp_path, make_module, LastCheckpoint(), Second(fails=True))
    train(tmp_path, make_module, LastCheckpoint())


def test_a_second_run_is_refused(tmp_path, make_module):
    with (
        FileLock(tmp_path / LOCK_FILE),
        pytest.raises(FolderInUseError, match=r"default_root_dir .* is in use by another process"),
    ):
        train(tmp_path, make_module, LastCheckpoint())
    assert not (tmp_path / "checkpoints").exists()


def test_the_holder_of_a_folder_trains_there(tmp_path, make_module):
    with folder_lock(tmp_path, "run"):
        train(tmp_path, make_module, LastCheckpoint())
    assert (tmp_path / "checkpoints" / "last.ckpt").is_file()


def test_without_checkpoints_there_is_no_lock(tmp_path, make_module):
    second = Second()
    train(tmp_path, make_module, second)
    assert second.was_held is False
