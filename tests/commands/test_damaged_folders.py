"""Frozen here: damaged files of a run's folder never change a resumed run.

* tables and settings that cannot be read, whatever replaces them, are renamed as
  NAME.broken with a warning, and the run ends with the weights of an uninterrupted one;
* checkpoints that cannot be read end in one line, or are passed over for whole ones;
* links to another disk stay links, and a lost one is named.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli_workbench import QUIET, Assets, Result, assert_same_weights

Type = Callable[..., Result]
RUN = Path("run")
LAST = RUN / "checkpoints" / "last.ckpt"


def words(assets: Assets, steps: int) -> list[str]:
    base = [*assets.models, *assets.data, *QUIET, "--method", "GKD", "--ckpt_path", "last"]
    base += ["--trainer.default_root_dir", "run", "--trainer.max_steps", str(steps)]
    return [*base, "--trainer.callbacks+=RolloutLog", "--trainer.callbacks.every_n_steps", "1"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of two steps and one of three, made when they are needed."""
    return {"folder": tmp_path_factory.mktemp("runs")}


@pytest.fixture
def resume(okd: Type, assets: Assets, runs: dict[str, Path]) -> Callable[[Callable], Result]:
    """Damage a run of two steps, and type the command that goes on to three."""
    if "short" not in runs:
        for name, steps in (("short", 2), ("whole", 3)):
            assert okd("fit", *words(assets, steps)).status == 0
            runs[name] = runs["folder"] / name
            shutil.copytree(RUN, runs[name]) if steps == 2 else shutil.move(RUN, runs[name])

    def damaged(damage: Callable) -> Result:
        shutil.copytree(runs["short"], RUN)
        damage()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return okd("fit", *words(assets, 3))

    return damaged


def replaced(content: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content)


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "file").write_text("x")


def zeros_behind(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0" * 512 + b"\n")


def cut_in_two(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


TABLES = ("metrics.csv", "rollouts.jsonl")
UNREADABLE = {
    "binary": replaced(bytes(range(256)) * 4 + b"\n"),
    "zeros": zeros_behind,
    "a folder": as_folder,
    "wrong columns": replaced(b"a,b\n1,2\n"),
    "no number": replaced(b"step,x\nmany,2\n"),
    "infinite": replaced(b"step,x\ninf,2\n"),
    "ragged": replaced(b"step,x\n1,2,3\n"),
    "no objects": replaced(b"[1]\n{}\n"),
    "deep": replaced(b"[" * 100_000 + b"\n"),
}
READABLE = {"empty": replaced(b""), "half a line": cut_in_two, "missing": Path.unlink}


def check_whole(result: Result, runs: dict[str, Path]) -> None:
    assert result.status == 0, result.err
    assert_same_weights(LAST, runs["whole"] / "checkpoints" / "last.ckpt")


@pytest.mark.parametrize("kind", UNREADABLE)
def test_unreadable_tables_are_set_aside(kind, resume, runs) -> None:
    result = resume(lambda: [UNREADABLE[kind](RUN / name) for name in TABLES])
    check_whole(result, runs)
    for name in TABLES:
        assert (RUN / f"{name}.broken").exists()
        assert (RUN / name).is_file()


def test_a_huge_cell_does_not_decide_over_a_resume(resume, runs) -> None:
    """The limit of ``csv``, which other libraries raise, decides whether the cell can be read."""
    huge = replaced(b"step,x\n1," + b"y" * 200_000 + b"\n")
    check_whole(resume(lambda: [huge(RUN / name) for name in TABLES]), runs)


@pytest.mark.parametrize("kind", READABLE)
def test_tables_that_end_too_early_are_cut(kind, resume, runs) -> None:
    check_whole(resume(lambda: [READABLE[kind](RUN / name) for name in TABLES]), runs)
    assert not list(RUN.glob("*.broken"))


def other_entries() -> None:
    """Everything else of a folder: none of it is read at a resume."""
    for name in ("config.yaml", "tensorboard/hparams.yaml"):
        as_folder(RUN / name)
    (RUN / "measures.jsonl").mkdir()
    (RUN / "stopped.json").write_bytes(b"\0")
    (RUN / ".holder.json").write_bytes(b"\xff")


def test_other_entries_are_set_aside(resume, runs) -> None:
    check_whole(resume(other_entries), runs)
    assert (RUN / "config.yaml").is_file()
    assert not (RUN / "stopped.json").exists()


def tensorboard_as_a_file() -> None:
    shutil.rmtree(RUN / "tensorboard")
    (RUN / "tensorboard").write_text("x")


def test_a_file_where_a_folder_belongs(resume, runs) -> None:
    check_whole(resume(tensorboard_as_a_file), runs)


def empty_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


CHECKPOINTS = {
    "empty": replaced(b""),
    "cut": cut_in_two,
    "text": replaced(b"no checkpoint\n"),
    "zeros": replaced(b"\0" * 4096),
    "folder": empty_folder,
    "foreign": lambda path: torch.save({"state_dict": {}}, path),
    "number": lambda path: torch.save(3, path),
    "hollow": lambda path: torch.save({"okd_lightning": 3}, path),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_broken_checkpoint_is_one_line(kind, resume) -> None:
    def damage() -> None:
        for path in LAST.parent.glob("best*"):
            path.unlink()
        CHECKPOINTS[kind](LAST)

    result = resume(damage)
    lines = [line for line in result.err.splitlines() if line.startswith("okd-lightning: ")]
    assert result.status == 1
    assert len(lines) == 1
    assert "unexpected" not in lines[0]
    assert "run/checkpoints" in lines[0]


def test_a_linked_folder_stays_a_link(okd: Type, assets: Assets, here: Path) -> None:
    (here / "disk").mkdir()
    RUN.mkdir()
    (RUN / "checkpoints").symlink_to(here / "disk")
    new = [*words(assets, 1)]
    del new[new.index("--ckpt_path") : new.index("--ckpt_path") + 2]
    for _ in range(2):
        assert okd("fit", *new).status == 0
    assert (RUN / "checkpoints").is_symlink()
    assert (here / "disk" / "last.ckpt").is_file()
    assert (RUN / "earlier" / "1" / "checkpoints" / "last.ckpt").is_file()
    before = (here / "disk" / "last.ckpt").read_bytes()
    Path("empty.jsonl").touch()
    failed = okd("fit", *new, "--data.train", "empty.jsonl")
    assert failed.status == 1
    assert (here / "disk" / "last.ckpt").read_bytes() == before
    assert os.listdir(RUN / "earlier") == ["1"]
    (here / "disk").rename(here / "gone")
    lost = okd("fit", *new)
    assert lost.status == 1
    assert "run/checkpoints is a link to" in lost.err
