"""Frozen here: ``--ckpt_path last``, the one command of a job that may be stopped at any time.

* it begins a run where there is no checkpoint, and goes on from the newest whole one where there
  is; a broken one is passed over with a warning, and where none can be read it says so;
* the command is taken as it is: its callbacks are not added to those of the checkpoint's config;
  where it names no student, the checkpoint's config fills in;
* a disk that is full ends a run with one line and a non-zero status, and costs no checkpoint.
"""

from __future__ import annotations

import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from cli_workbench import QUIET, Assets, Result, assert_same_weights

Fit = Callable[..., Result]
RUN = Path("run")
LAST = RUN / "checkpoints" / "last.ckpt"
OPTIONS = [
    *("--method", "KD", "--ckpt_path", "last"),
    *("--trainer.callbacks+=LastCheckpoint", "--trainer.callbacks.every_n_steps", "2"),
    *("--trainer.callbacks.keep", "2"),
]


def step_of(path: Path) -> int:
    return int(torch.load(path, weights_only=True)["global_step"])


def test_one_command_begins_and_continues(fit: Fit, assets: Assets) -> None:
    begun = fit(*OPTIONS, "--trainer.max_steps", "4")
    assert "there is no checkpoint: a new run begins" in begun.log
    assert step_of(LAST) == 4
    again = fit(*OPTIONS, "--trainer.max_steps", "6")
    assert f"the run continues from {LAST}" in again.log
    assert step_of(LAST) == 6
    done = fit(*OPTIONS, "--trainer.max_steps", "6")
    assert done.status == 0
    assert not (RUN / "earlier").exists()


def test_the_folder_alone_is_enough(fit: Fit, okd: Fit) -> None:
    fit(*OPTIONS, "--trainer.max_steps", "4")
    words = ["--ckpt_path", "last", "--trainer.default_root_dir=run"]
    result = okd("fit", *words, "--trainer.max_steps", "6")
    assert result.status == 0, result.err
    assert step_of(LAST) == 6
    measured = okd("validate", *words)
    assert "val/forward_kl" in measured.out
    other = okd("validate", "--ckpt_path", "last", "--trainer.default_root_dir", "other")
    assert other.status == 1
    assert "there are no checkpoints in other/checkpoints" in other.err


def test_a_broken_one_is_passed_over(fit: Fit, okd: Fit, assets: Assets) -> None:
    fit(*OPTIONS, "--trainer.max_steps", "6")
    whole = LAST.read_bytes()
    LAST.unlink()
    LAST.write_bytes(whole[:-100])
    broken = okd("fit", "--ckpt_path", str(LAST))
    assert broken.status == 1
    line = next(x for x in broken.err.splitlines() if x.startswith("okd-lightning: "))
    assert "last.ckpt' is cut off or broken" in line
    assert "take another: next to it there are run/checkpoints/" in line
    with pytest.warns(UserWarning, match=r"last\.ckpt cannot be read; the run continues from run/"):
        fit(*OPTIONS, "--trainer.max_steps", "8", "--trainer.max_epochs", "2")
    assert step_of(LAST) == 8
    for path in LAST.parent.iterdir():
        path.write_bytes(b"")
    result = okd("fit", *OPTIONS, *assets.models, *assets.data, "--trainer.default_root_dir", "run")
    assert result.status == 1
    assert "none of the checkpoints in run/checkpoints can be read" in result.err


@pytest.fixture
def small_disk() -> Iterator[Callable[[int], None]]:
    """Limits how large a file may become; the kernel refuses more, as on a full disk."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_costs_no_checkpoint(
    fit: Fit, okd: Fit, assets: Assets, small_disk: Callable[[int], None]
) -> None:
    fit(*OPTIONS, "--trainer.max_steps", "6")
    RUN.rename("whole")
    fit(*OPTIONS, "--trainer.max_steps", "2")
    before = LAST.read_bytes()
    words = [*assets.models, *assets.data, *QUIET, "--trainer.default_root_dir", "run", *OPTIONS]
    small_disk(len(before) // 2)
    result = okd("fit", *words, "--trainer.max_steps", "6")
    small_disk(resource.RLIM_INFINITY)
    assert result.status == 1
    (line,) = [x for x in result.err.splitlines() if x.startswith("okd-lightning: ")]
    assert "cannot be written (File too large); what it held before is untouched" in line
    assert LAST.read_bytes() == before
    assert not [path for path in LAST.parent.iterdir() if path.name.startswith(".")]
    fit(*OPTIONS, "--trainer.max_steps", "6")
    assert_same_weights(LAST, Path("whole/checkpoints/last.ckpt"))
