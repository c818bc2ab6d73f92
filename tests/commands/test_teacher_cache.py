"""``--model.teacher CachedTeacher`` on the command line.

Frozen here: a folder is enough, k has a flag of its own; the run's config holds it, so that a
resumed run reads it again; test measures against the teacher itself; export works; what cannot be
done from a cache ends in one line before anything is written.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from cli_workbench import Assets, Result, assert_same_weights, metric_names

Fit = Callable[..., Result]


@pytest.fixture
def cache(assets: Assets) -> list[str]:
    """The options of a cached teacher."""
    return [
        *("--model.teacher", "CachedTeacher", "--model.teacher.model", assets.teacher),
        *("--model.teacher.folder", "cache"),
    ]


LAST = Path("run/checkpoints/last.ckpt")


def test_fit_resume_test_and_export(fit: Fit, okd: Fit, cache) -> None:
    long = ("--trainer.max_epochs", "2")
    first = fit("--method", "KD", *cache, *long, "--trainer.default_root_dir", "whole")
    assert "written to its cache, 48 ids per token" in first.log
    assert first.log.count("val/top_k_*") == 1
    names = metric_names(Path("whole/metrics.csv"))
    assert {"train/kd", "val/top_k_reverse_kl", "val/agreement", "val/cross_entropy"} <= names
    assert not [n for n in names if n.endswith(("val/reverse_kl", "on_policy_reverse_kl"))]
    assert "best-step=" in first.log

    cut = fit("--method", "KD", *cache, "--trainer.max_epochs", "1")
    assert "read from its cache" in cut.log
    config = yaml.safe_load(Path("run/config.yaml").read_text())
    assert config["model"]["teacher"]["init_args"]["folder"] == "cache"
    resumed = okd("fit", "--ckpt_path", str(LAST), *long)
    assert resumed.status == 0, resumed.err
    assert "read from its cache" in resumed.log
    assert_same_weights(LAST, Path("whole/checkpoints/last.ckpt"))

    tested = okd("test", "--ckpt_path", str(LAST))
    assert tested.status == 0, tested.err
    assert "test/forward_kl" in tested.out
    assert "top_k" not in tested.out
    assert okd("export", "--ckpt_path", str(LAST), "--out", "out").status == 0
    assert Path("out/model.safetensors").is_file()


def test_settings_of_its_own(fit: Fit, assets: Assets, cache) -> None:
    flags = [*cache, "--model.teacher.k", "300", "--model.teacher.dtype", "float32"]
    result = fit("--method", "KD", *flags)
    assert "258 ids per token" in result.log  # the whole vocabulary
    config = yaml.safe_load(Path("run/config.yaml").read_text())
    settings = {"model": assets.teacher, "folder": "cache", "k": 300, "dtype": "float32"}
    assert config["model"]["teacher"] == {
        "class_path": "okd_lightning.teachers.CachedTeacher",
        "init_args": settings,
    }


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--method", "GKD"], "needs the teacher on responses that the student generates"),
        (["--method", "KD", "--method.temperature", "2"], "its temperature is 2"),
        (["--method", "OKD"], "an online module is trained on a teacher that is run"),
        (["--method", "KD", "--model.teacher.folder", "file/x"], "cannot be written"),
        (["--method", "KD", "--model.teacher.k", "0"], "model.teacher.k must be at least 1"),
        (
            ["--method", "KD", "--model.teacher.fodler", "x"],
            "no setting 'fodler'; did you mean fol",
        ),
        (["--method", "KD", "--model.teacher.k", "few"], "k: expected a whole number, got 'few'"),
    ],
)
def test_one_line_for_what_cannot_be(okd: Fit, assets: Assets, cache, flags, words) -> None:
    Path("file").touch()
    own = ["--model.student", assets.student, *cache, "--trainer.accelerator", "cpu"]
    result = okd("fit", assets.data, own, *flags)
    assert result.status in (1, 2)
    assert words in result.err
    assert len(result.err.strip().splitlines()) == 1 or words in result.err.splitlines()[-1]
    assert not list(Path("runs").glob("*/metrics.csv"))
    assert not Path("cache").exists()
