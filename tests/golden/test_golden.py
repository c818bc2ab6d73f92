"""Golden runs: a change that should not touch the numbers touches none of them.

Frozen here: the losses of every step, as hexadecimal floats, and a SHA-256 of the trained weights,
one section a platform in ``<name>.txt``. On a platform with a section both are compared with
``==``; elsewhere the losses are compared with the first section's, to rounding. Checkpoints of
earlier versions are gone on from in the same way, in place and without a change to them.
``make golden`` rewrites this platform's sections: only on purpose, with the reason in the
changelog.
"""

from __future__ import annotations

import shutil

import pytest
from golden.old_checkpoints import CHECKPOINTS, METHODS, train
from golden.old_checkpoints import write as write_missing
from golden.runs import RUNS
from golden.sections import FOLDER, WRITES, compare


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_what_it_was(name, tmp_path):
    compare(FOLDER / f"{name}.txt", RUNS[name](tmp_path))


@pytest.mark.parametrize("name", METHODS)
def test_a_checkpoint_of_an_earlier_version_continues(name, tmp_path):
    if WRITES:
        write_missing(tmp_path / "written")
    ours = tmp_path / "run" / "checkpoints" / name
    ours.parent.mkdir(parents=True)
    kept = CHECKPOINTS / name
    (shutil.copytree if kept.is_dir() else shutil.copy)(kept, ours)
    compare(CHECKPOINTS / f"{name}.txt", train(tmp_path / "run", name, ours))


def test_every_file_is_of_a_run():
    assert {path.stem for path in FOLDER.glob("*.txt")} == set(RUNS)
