"""A run's files, cut at the checkpoint from which it resumes.

Frozen here: rows after the checkpoint are removed and earlier ones kept, also where the last line
is half written; the row of the checkpoint's own step, which is logged after it, is added once where
a kill came between the two; a new column never leaves the file half written; what a killed process
was writing aside is removed; a run that fails before its first step gives its files back, and
removes none that was there before it, also where it resumes from checkpoints alone.
"""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from okd_lightning import durable_files
from okd_lightning.commands.run_folder import resume_run, start_run
from okd_lightning.errors import OutputError
from okd_lightning.training.run_records import RunCSVLogger

ROW = {"train/loss": 0.3, "epoch": 0, "step": 2}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a run folder with two rows of training, one of validation, and half a row."""
    logger = RunCSVLogger(str(tmp_path))
    for step in (0, 1):
        logger.log_metrics({"train/loss": 0.1 + step / 10, "epoch": 0}, step=step)
        logger.save()
    logger.log_metrics({"val/loss": 0.5, "epoch": 0}, step=1)
    logger.save()
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("0,3")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / ".last.ckpt.new").write_bytes(b"half")
    return tmp_path


def rows(folder: Path) -> list[tuple[str, str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return [(r["step"], r["train/loss"], r["val/loss"]) for r in csv.DictReader(file)]


BEFORE = [("0", "0.1", ""), ("1", "0.2", ""), ("1", "", "0.5")]


def test_the_row_of_the_checkpoints_own_step(folder: Path) -> None:
    resume_run(folder, 3, ROW)
    assert rows(folder) == [*BEFORE, ("2", "0.3", "")]
    resume_run(folder, 3, ROW)
    assert rows(folder) == [*BEFORE, ("2", "0.3", "")]
    assert not list((folder / "checkpoints").iterdir())


def test_a_row_of_validation_is_not_that_of_its_step(folder: Path) -> None:
    resume_run(folder, 1, None)
    assert rows(folder) == BEFORE[:1]
    logger = RunCSVLogger(str(folder))
    logger.log_metrics({"val/loss": 0.4, "epoch": 0}, step=1)
    logger.save()
    resume_run(folder, 2, {**ROW, "step": 1})
    assert rows(folder) == [BEFORE[0], ("1", "", "0.4"), ("1", "0.3", "")]


def test_a_validation_that_is_due_is_logged_once(folder: Path) -> None:
    """A killed attempt has logged it, and the next one begins with it again."""
    resume_run(folder, 3, None, validation_is_due=True)  # this one is of an earlier step
    assert rows(folder) == BEFORE
    resume_run(folder, 2, None, validation_is_due=True)
    assert rows(folder) == BEFORE[:2]


def test_a_new_column_comes_in_one_move(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resume_run(folder, 2, None)
    before = (folder / "metrics.csv").read_bytes()

    def fails(*args):
        raise OSError(28, "No space left on device")

    logger = RunCSVLogger(str(folder))
    with monkeypatch.context() as patched:
        patched.setattr(durable_files.os, "replace", fails)
        with pytest.raises(OutputError, match=r"metrics\.csv cannot be written \(No space"):
            logger.log_metrics({"new": 1.0}, step=2)
    assert (folder / "metrics.csv").read_bytes() == before


def test_files_are_given_back(folder: Path) -> None:
    before = (folder / "metrics.csv").read_bytes()
    prepared = resume_run(folder, 1, None)
    assert (folder / "metrics.csv").read_bytes() != before
    prepared.withdraw()
    assert (folder / "metrics.csv").read_bytes() == before


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("entries", [(), ("checkpoints/last.ckpt",), ("tensorboard/events",)])
@pytest.mark.parametrize("begin", [lambda folder: resume_run(folder, 1, None), start_run])
def test_only_what_the_run_has_made_is_removed(begin, entries, tmp_path: Path) -> None:
    for name in entries:
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"kept")
    before = contents(tmp_path)
    prepared = begin(tmp_path)
    for name in ("config.yaml", "metrics.csv"):
        (tmp_path / name).write_text("new")
    prepared.withdraw()
    assert contents(tmp_path) == before if entries else not tmp_path.exists()
