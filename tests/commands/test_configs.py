"""Frozen here: sources of settings, and their precedence.

* later configs override earlier ones, and typed options override all, in any order;
* another class of method drops the settings of the one before, with one warning;
* ``--print_config`` and a run's config.yaml can be fed back and give the same run.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from cli_workbench import LENGTHS, QUIET, Assets, Result, metric_names, read_metrics

from okd_lightning.commands import cli_arguments

Type = Callable[..., Result]
RUN = Path("run")


@pytest.fixture
def config(assets: Assets, here: Path) -> str:
    """A complete run as a file."""
    settings = {
        "model": {"student": assets.student, "teacher": assets.teacher, "learning_rate": 1e-3},
        "data": {
            "train": assets.train,
            "max_prompt_length": 16,
            "max_response_length": 8,
            "batch_size": 2,
        },
        "method": {"class_path": "KD", "init_args": {"temperature": 4.0}},
        "trainer": {
            "default_root_dir": "run",
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "log_every_n_steps": 1,
            "max_steps": 2,
        },
    }
    (here / "run.yaml").write_text(yaml.safe_dump(settings))
    return "run.yaml"


def resolved() -> dict:
    return yaml.safe_load((RUN / "config.yaml").read_text())


def test_a_config_is_a_whole_run(okd: Type, config: str) -> None:
    assert okd("fit", "--config", config).status == 0
    assert resolved()["method"]["init_args"]["temperature"] == 4.0


def test_a_text_may_begin_with_a_hash(okd: Type, config: str, here: Path) -> None:
    (here / "pattern.yaml").write_text(
        "trainer: {callbacks: [{class_path: ExactMatch, init_args: {pattern: '#### (.+)'}}]}\n"
    )
    template = ["--data.prompt_template", "# {prompt}"]
    result = okd("fit", "--config", config, "--config", "pattern.yaml", template)
    assert result.status == 0, result.err
    assert resolved()["data"]["prompt_template"] == "# {prompt}"
    patterns = [c["init_args"].get("pattern") for c in resolved()["trainer"]["callbacks"]]
    assert "#### (.+)" in patterns


def test_overlays_and_flags(okd: Type, config: str, here: Path) -> None:
    (here / "overlay.yaml").write_text("model: {learning_rate: 0.1}\ndata: {batch_size: 3}\n")
    result = okd(
        *("fit", "--data.batch_size", "4", "--method.temperature=2.5", "-c", config),
        "--config=overlay.yaml",
    )
    assert result.status == 0, result.err
    found = resolved()
    assert found["model"]["learning_rate"] == 0.1
    assert found["data"]["batch_size"] == 4
    assert found["data"]["max_prompt_length"] == 16
    assert found["method"]["init_args"]["temperature"] == 2.5


@pytest.mark.parametrize("typed", [["--method", "GKD"], ["--method=GKD"]])
def test_another_method_drops_the_old_ones_settings(
    okd: Type, config: str, typed: list[str]
) -> None:
    with pytest.warns(UserWarning, match="KD.*settings.*temperature.*dropped") as warned:
        result = okd("fit", "--config", config, *typed)
    assert result.status == 0, result.err
    ours = [w for w in warned if "dropped" in str(w.message)]
    assert len(ours) == 1
    assert resolved()["method"]["init_args"]["temperature"] == 1.0


@pytest.mark.parametrize("method", ["KDD", {"class_path": "KDD", "init_args": {"a": 1}}])
def test_a_misspelt_method_is_refused_next_to_a_typed_one(
    okd: Type, config: str, here: Path, method: object
) -> None:
    (here / "overlay.yaml").write_text(yaml.safe_dump({"method": method}))
    result = okd("fit", "--config", config, "--config", "overlay.yaml", "--method", "KD")
    assert result.status != 0
    assert "KDD: there is no such method; did you mean KD?" in result.err


def test_an_overlays_method_drops_them_too(okd: Type, config: str, here: Path) -> None:
    (here / "gkd.yaml").write_text("method: {class_path: GKD, init_args: {beta: 0.2}}\n")
    with pytest.warns(UserWarning, match=r"run\.yaml sets up KD"):
        assert okd("fit", "--config", config, "--config", "gkd.yaml").status == 0
    assert resolved()["method"]["class_path"].endswith("GKD")
    assert resolved()["method"]["init_args"]["beta"] == 0.2


@pytest.mark.parametrize("name", ["KD", "okd_lightning.callbacks.KD", "okd_lightning.KD"])
def test_the_same_method_by_any_name_keeps_them(okd: Type, config: str, name: str) -> None:
    result = okd("fit", "--config", config, "--method", name)
    assert result.status == 0, result.err
    assert resolved()["method"]["init_args"]["temperature"] == 4.0


def test_print_config_can_be_fed_back(okd: Type, config: str, here: Path, capsys) -> None:
    with pytest.raises(SystemExit) as exit_:
        okd("fit", "--config", config, "--data.on_overlong", "error", "--print_config")
    assert exit_.value.code == 0
    printed = capsys.readouterr().out
    assert not RUN.exists()
    (here / "printed.yaml").write_text(printed)
    assert okd("fit", "--config", "printed.yaml").status == 0
    assert resolved()["data"]["on_overlong"] == "error"
    assert resolved()["method"]["init_args"]["temperature"] == 4.0


def test_a_runs_config_gives_the_same_run(okd: Type, config: str, assets: Assets) -> None:
    assert okd("fit", "--config", config, "--method.divergence", "JensenShannon").status == 0
    first, settings = read_metrics(RUN / "metrics.csv"), resolved()
    result = okd("fit", "--config", "run/config.yaml")
    assert result.status == 0, result.err
    assert read_metrics(RUN / "metrics.csv") == first
    assert resolved() == settings


def test_a_packaged_config_by_name(
    okd: Type, config: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"tiny": here / config, "overlays/short": here / "short.yaml"}
    (here / "short.yaml").write_text("trainer: {max_steps: 1}\n")
    monkeypatch.setattr(cli_arguments, "packaged_configs", lambda: found)
    assert okd("fit", "--config", "tiny", "--config", "overlays/short").status == 0
    assert resolved()["trainer"]["max_steps"] == 1
    result = okd("fit", "--config", "tiyn")
    assert result.status == 1
    assert "did you mean tiny?" in result.err


def test_a_file_wins_over_a_packaged_name(okd: Type, config: str, here: Path) -> None:
    Path(config).rename(here / "gsm8k")
    assert okd("fit", "--config", "gsm8k").status == 0


def test_the_packaged_configs_are_the_checkouts() -> None:
    root = Path(cli_arguments.__file__).parents[2] / "configs"
    files = {str(p.relative_to(root).with_suffix("")) for p in root.rglob("*.yaml")}
    assert files
    assert set(cli_arguments.packaged_configs()) == files


def test_null_in_a_config_is_the_default(okd: Type, config: str, here: Path) -> None:
    (here / "null.yaml").write_text("data: {val: null}\nmodel: {student_adapter: null}\n")
    assert okd("fit", "--config", config, "--config", "null.yaml").status == 0


def test_flags_alone_say_the_same_as_a_config(okd: Type, config: str, assets: Assets) -> None:
    assert okd("fit", "--config", config).status == 0
    first = read_metrics(RUN / "metrics.csv")
    flags = ["--data.train", assets.train, *LENGTHS[:6], *QUIET]
    flags += ["--trainer.default_root_dir", "run"]
    flags += ["--model.learning_rate", "1e-3", "--trainer.max_steps", "2"]
    okd("fit", assets.models, flags, "--method", "KD", "--method.temperature", "4")
    assert read_metrics(RUN / "metrics.csv") == first


def test_infinity_is_a_number(okd: Type, assets: Assets) -> None:
    """``inf`` is a number in the spelling of the options' help, and in YAML's."""
    base = ["fit", *assets.models, *assets.data, *QUIET, "--method", "OPD"]
    base += ["--trainer.max_steps", "1", "--trainer.default_root_dir", "run"]
    option = "--method.max_log_ratio"
    for words, clips in (
        ([option, "inf"], False),
        ([option, ".inf"], False),
        ([f"{option}=inf"], False),
        ([option, "3"], True),
    ):
        result = okd(base, words)
        assert result.status == 0, result.err
        names = metric_names(Path("run/metrics.csv"))
        assert ("train/opd_log_ratio_clipped" in names) == clips
