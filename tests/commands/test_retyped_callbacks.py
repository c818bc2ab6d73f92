"""A callback that a config has and that is typed again.

Frozen here: at a resume and above a config, the typed one takes the place of one of its class, and
keeps its state; another one is added; two that a checkpoint could not tell apart are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import yaml
from cli_workbench import Result

Fit = Callable[..., Result]
LAST = str(Path("run") / "checkpoints" / "last.ckpt")
SHORT = ["--method", "KD", "--trainer.max_steps", "2"]


def configured() -> list[dict]:
    config = yaml.safe_load(Path("run/config.yaml").read_text())
    return [
        (c["class_path"].rpartition(".")[2], c["init_args"]) for c in config["trainer"]["callbacks"]
    ]


def added(name: str, *settings: str) -> list[str]:
    words = ["--trainer.callbacks+=" + name]
    for setting in settings:
        option, value = setting.split("=")
        words += [f"--trainer.callbacks.{option}", value]
    return words


def test_the_typed_one_takes_the_configured_ones_place(fit: Fit, okd: Fit) -> None:
    first = added("LastCheckpoint", "every_n_steps=1") + added("LearningRateMonitor")
    fit(*SHORT, *first, "--trainer.val_check_interval", "2")
    again = added("LastCheckpoint", "every_n_steps=2") + added("RolloutLog")
    longer = ["--trainer.max_steps", "4"]
    result = okd("fit", "--ckpt_path", LAST, *longer, *again)
    assert result.status == 0, result.err
    assert "LastCheckpoint of run/checkpoints/last.ckpt: replaced by what was typed" in result.log
    found = dict(configured())
    assert list(found) == ["LearningRateMonitor", "LastCheckpoint", "RolloutLog"]
    assert found["LastCheckpoint"]["every_n_steps"] == 2


def test_above_a_config_file(fit: Fit) -> None:
    Path("base.yaml").write_text(
        "trainer: {callbacks: [{class_path: LastCheckpoint, init_args: {keep: 2}}]}\n"
    )
    fit("--config", "base.yaml", *SHORT, *added("LastCheckpoint", "keep=3"))
    assert [settings["keep"] for _, settings in configured()] == [3]


def test_names_tell_methods_apart(fit: Fit, okd: Fit) -> None:
    fit(*SHORT, *added("KD", "name=hot", "temperature=3"))
    result = okd("fit", "--ckpt_path", LAST, *added("KD", "name=hot", "temperature=2"))
    assert result.status == 0, result.err
    ((_, settings),) = configured()
    assert settings["temperature"] == 2.0


def test_two_of_a_kind_are_refused(okd: Fit, assets) -> None:
    result = okd("fit", *assets.data, *assets.models, *SHORT, *(2 * added("BestCheckpoint")))
    assert result.status == 1
    assert "trainer.callbacks holds 2 BestCheckpoint" in result.err
