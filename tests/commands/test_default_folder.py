"""Frozen here: the run folder of a command that names none, and one run at a time in a folder.

* every run gets a folder of its own below runs/, named after its method, the same on all ranks;
* ``--ckpt_path last`` resumes the newest run of the same settings, begins one where there is none,
  and refuses with their names where several wait to be resumed; without settings it takes the only
  run there is;
* a folder in which another process trains is refused with that process's host and number, and
  nothing in it changes; the lock of a killed process has no effect.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import soak
import torch
from cli_workbench import LENGTHS, QUIET, Assets, Result

from okd_lightning.checkpoints.folder_lock import HOLDER_FILE, folder_lock

Type = Callable[..., Result]
KD = ["--method", "KD", "--trainer.max_steps", "2", "--trainer.val_check_interval", "1"]
LAST = ["--ckpt_path", "last"]


@pytest.fixture
def train(okd: Type, assets: Assets) -> Type:
    """``fit`` of two steps without a folder."""

    def typed(*more: str) -> Result:
        return okd("fit", *assets.models, *assets.data, *QUIET, *KD, *more)

    return typed


def folders() -> list[Path]:
    return sorted(Path("runs").iterdir(), key=lambda path: path.stat().st_mtime)


def step_of(folder: Path) -> int:
    path = folder / "checkpoints" / "last.ckpt"
    return int(torch.load(path, weights_only=True)["global_step"])


def test_every_run_has_a_folder_of_its_own_and_last_finds_it(train: Type, okd: Type) -> None:
    for options in ([*LAST], [*LAST, "--model.learning_rate", "1e-3"]):
        begun = train(*options)
        assert begun.status == 0, begun.err
    first, second = folders()
    assert first.name.startswith("KD-")
    again = train(*LAST)
    assert again.status == 0, again.err
    assert f"the run continues from {first}/checkpoints/last.ckpt" in again.log
    several = okd("validate", *LAST)
    assert several.status == 1
    assert f"there are several runs: {second}, {first}; give --trainer.default" in several.err
    named = okd("validate", *LAST, "--trainer.default_root_dir", str(first))
    assert named.status == 0, named.err
    (second / "config.yaml").write_bytes((first / "config.yaml").read_bytes())
    for folder in (first, second):
        (folder / HOLDER_FILE).write_text("{}")  # as a killed process leaves it
    refused = train(*LAST)
    assert refused.status == 1
    assert f"can be resumed: {second}, {first}; give --trainer.default_root_dir" in refused.err
    (first / "config.yaml").write_bytes(b"\0{")
    with pytest.warns(UserWarning, match=r"config\.yaml cannot be read"):
        assert f"continues from {second}" in train(*LAST).log


def test_a_folder_is_one_runs(train: Type, here: Path) -> None:
    words = ["--trainer.default_root_dir", "run"]
    assert train(*words).status == 0
    files = {p: p.read_bytes() for p in Path("run").rglob("*") if p.is_file()}
    with folder_lock(Path("run"), "run"):
        for more in ([], LAST, ["--ckpt_path", "run/checkpoints/last.ckpt"]):
            second = train(*words, *more)
            assert second.status == 1
            holder = f"process {os.getpid()} on host {os.uname().nodename}"
            assert f"--trainer.default_root_dir 'run' is in use by {holder}: wait" in second.err
    assert {p: p.read_bytes() for p in files} == files
    assert not Path("run/earlier").exists()
    assert train(*words).status == 0


def test_the_lock_of_a_killed_process_is_none(train: Type, here: Path) -> None:
    Path("run").mkdir()
    child = os.fork()
    if not child:
        with folder_lock(Path("run"), "run"):
            time.sleep(600)
        os._exit(0)
    while not Path("run", HOLDER_FILE).exists():
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert Path("run", HOLDER_FILE).exists()
    assert train("--trainer.default_root_dir", "run").status == 0
    assert not Path("run", HOLDER_FILE).exists()


def test_a_failed_run_leaves_no_folder(train: Type, here: Path) -> None:
    Path("empty.jsonl").touch()
    failed = train("--data.train", "empty.jsonl")
    assert failed.status == 1
    assert not list(here.glob("runs/*"))


def test_all_ranks_share_the_first_ones_folder(assets: Assets, here: Path) -> None:
    """Every rank is started with the command, as under torchrun, and chooses a name."""
    argv = ["fit", *assets.models, "--data.train", assets.train, *LENGTHS, *QUIET, *KD]
    argv += ["--trainer.devices", "2", "--trainer.strategy", "ddp", *LAST]
    for _ in range(2):
        ended = soak.attempt(here, argv, 2, None)
        assert (ended.status, ended.others) == (0, [0]), soak._tail(here)
    (folder,) = folders()
    assert step_of(folder) == 2
    assert {p.name for p in folder.iterdir()} >= {"config.yaml", "metrics.csv", "checkpoints"}
