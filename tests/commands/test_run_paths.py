"""Paths in a run's settings.

Frozen here: ``~`` is expanded once, in files and as typed, for everything that reads the settings;
a checkpoint is used from any folder: its relative paths are those from where its run was started,
and a hub id stays one.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from cli_workbench import LENGTHS, QUIET, Assets, Result

from okd_lightning.errors import ConfigError
from okd_lightning.training.config_paths import expand_home, relocate

Fit = Callable[..., Result]
SHORT = ["--method", "KD", "--trainer.max_steps", "2", "--trainer.callbacks+=BestCheckpoint"]


@pytest.fixture
def home(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = here / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    return folder


def test_home_is_expanded_once(okd: Fit, assets: Assets, home: Path) -> None:
    shutil.copytree(assets.student, home / "student")
    shutil.copy(assets.train, home / "train.jsonl")
    (home / "run.yaml").write_text(
        "trainer: {default_root_dir: ~/run}\ndata: {val: ~/train.jsonl}\n"
    )
    words = [*("--model.student", "~/student"), "--model.teacher", assets.teacher, *QUIET, *LENGTHS]
    words += ["--data.train=~/train.jsonl", *SHORT, "--trainer.callbacks.folder", "~/best"]
    result = okd("fit", "--config=~/run.yaml", *words, *("--trainer.val_check_interval", "2"))
    assert result.status == 0, result.err
    config = yaml.safe_load((home / "run" / "config.yaml").read_text())
    assert config["model"]["student"] == str(home / "student")
    assert (home / "run" / "metrics.csv").is_file()
    assert list((home / "best").glob("*.ckpt"))
    assert not Path("~").exists()
    assert okd("validate", "--ckpt_path=~/run/checkpoints/last.ckpt").status == 0
    assert okd("export", "--ckpt_path=~/run/checkpoints/last.ckpt", "--out=~/out").status == 0
    assert (home / "out" / "config.json").is_file()
    assert not Path("~").exists()


def test_a_checkpoint_from_any_folder(
    okd: Fit, assets: Assets, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("student", "teacher"):
        shutil.copytree(assets.folder / name, name)
    for name in ("train.jsonl", "val.jsonl"):
        shutil.copy(assets.folder / name, name)
    words = ["--model.student", "student", "--model.teacher", "./teacher", *QUIET, *LENGTHS, *SHORT]
    words += ["--data.train", "train.jsonl", "--data.val", "val.jsonl"]
    words += ["--trainer.default_root_dir", "run", "--trainer.callbacks.folder", "best"]
    assert okd("fit", *words).status == 0
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    last = "../run/checkpoints/last.ckpt"
    again = ["--trainer.max_steps", "4", "--trainer.val_check_interval", "2"]
    result = okd("fit", "--ckpt_path", last, *again)
    assert result.status == 0, result.err
    assert not list(Path.cwd().iterdir())
    assert (here / "run" / "metrics.csv").read_text().count("\n") > 4
    assert list((here / "best").glob("*.ckpt"))
    assert okd("test", "--ckpt_path", last).status == 0
    assert okd("export", "--ckpt_path", last, "--out", "out").status == 0
    monkeypatch.chdir(here)
    config = yaml.safe_load(Path("run/config.yaml").read_text())
    assert config["data"]["train"] == str(here / "train.jsonl")
    assert (
        okd("fit", "--ckpt_path", "run/checkpoints/last.ckpt", "--trainer.max_steps", "5").status
        == 0
    )


CONFIG = {
    "model": {
        "student": "student",
        "teacher": {
            "class_path": "okd_lightning.teachers.CachedTeacher",
            "init_args": {"model": "org/teacher", "folder": "cache", "k": 4},
        },
        "engine": {
            "class_path": "okd_lightning.engines.VLLMServer",
            "init_args": {"url": "http://h"},
        },
    },
    "data": {"train": ["not", "a path"], "val": "val.jsonl", "token_cache": "auto"},
    "trainer": {
        "default_root_dir": "run",
        "callbacks": [
            {
                "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                "init_args": {"dirpath": "kept", "filename": "at", "monitor": "val/jsd"},
            }
        ],
        "logger": {
            "class_path": "lightning.pytorch.loggers.CSVLogger",
            "init_args": {"save_dir": "~/logs", "name": "name"},
        },
    },
}


def copy() -> dict:
    return yaml.safe_load(yaml.safe_dump(CONFIG))


def test_what_is_a_path(tmp_path: Path) -> None:
    (tmp_path / "student").mkdir()
    (tmp_path / "val.jsonl").touch()
    config = copy()
    relocate(config, str(tmp_path), "last.ckpt")
    expected = copy()
    expected["model"]["student"] = str(tmp_path / "student")
    expected["model"]["teacher"]["init_args"]["folder"] = str(tmp_path / "cache")
    expected["data"]["val"] = str(tmp_path / "val.jsonl")
    expected["trainer"]["default_root_dir"] = str(tmp_path / "run")
    expected["trainer"]["callbacks"][0]["init_args"]["dirpath"] = str(tmp_path / "kept")
    expected["trainer"]["logger"]["init_args"]["save_dir"] = str(tmp_path / "~/logs")
    assert config == expected
    expand_home(config := copy())
    assert config["trainer"]["logger"]["init_args"]["save_dir"] == str(Path("~/logs").expanduser())


@pytest.mark.parametrize("start", [None, "/no/such/folder"])
def test_without_a_starting_folder_paths_stay(start: str | None) -> None:
    config = copy()
    relocate(config, start, "last.ckpt")
    assert config == CONFIG


def test_a_hub_id_is_no_folder_of_here(
    here: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    (here / "org" / "teacher").mkdir(parents=True)
    with pytest.raises(
        ConfigError, match=r"--model\.teacher\.model 'org/teacher' of last\.ckpt was not a path"
    ):
        relocate(copy(), str(tmp_path_factory.mktemp("start")), "last.ckpt")
