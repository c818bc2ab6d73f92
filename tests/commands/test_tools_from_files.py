"""Runs that call tools, from the command line and real files: ToolAlpaca, Qwen's tokenizer.

Frozen here: a run is configured, trained, checkpointed, killed, resumed, tested and predicted from
by the usual commands, its tools named by class; mistakes are one line.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import tool_chats
import yaml
from cli_workbench import (
    QUIET,
    Assets,
    Result,
    assert_same_weights,
    metric_names,
    read_metrics,
    write_jsonl,
)
from transformers import AutoTokenizer

Type = Callable[..., Result]
RUN = Path("run")
ROOT = Path(__file__).parents[2]

ASKED = [
    {
        "messages": [{"role": "user", "content": "What is 1+1?"}],
        "response": tool_chats.CALLS[0],
    }
]


@pytest.fixture(scope="module")
def toolalpaca() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "toolalpaca", ROOT / "benchmarks" / "toolalpaca.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def files(tmp_path_factory, toolalpaca, shared_data) -> Path:
    """ToolAlpaca's rows, and two tiny models on Qwen's tokenizer, which knows some calls."""
    folder = tmp_path_factory.mktemp("tools")
    source = shared_data / "datasets" / "toolalpaca" / "eval_real.json"
    rows = toolalpaca.rows_of(json.loads(source.read_text(encoding="utf-8")))
    rows = sorted(rows, key=lambda row: len(json.dumps(row["tools"])))
    write_jsonl(folder / "train.jsonl", [*rows[:14:2], *ASKED])
    write_jsonl(folder / "val.jsonl", [rows[1], rows[3], *ASKED])
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "tokenizers" / "qwen2.5")
    tokenizer.add_tokens(tool_chats.CALLS)
    for seed, name in enumerate(("student", "teacher")):
        tool_chats.make_caller(seed, tokenizer, bias=20.0, width=16).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def settings(files: Path) -> dict:
    return {
        "model": {"student": str(files / "student"), "teacher": str(files / "teacher")},
        "data": {
            "train": str(files / "train.jsonl"),
            "val": str(files / "val.jsonl"),
            "tools": [{"class_path": "Calculator"}],
            "max_turns": 2,
            "max_prompt_length": 400,
            "max_response_length": 48,
            "prompts_per_epoch": 4,
            "batch_size": 2,
            "samples_per_prompt": 2,
            "val_rollouts": 2,
        },
        "trainer": {
            "callbacks": [
                {
                    "class_path": "Reward",
                    "init_args": {
                        "function": {"class_path": "ToolCallMatch"},
                        "baseline": "leave_one_out",
                    },
                },
                {"class_path": "RolloutLog", "init_args": {"every_n_steps": 1}},
                {"class_path": "ExactMatch"},
                {
                    "class_path": "ModelCheckpoint",
                    "init_args": {
                        "dirpath": "kept",
                        "filename": "at-{step}",
                        "every_n_train_steps": 2,
                        "save_top_k": -1,
                    },
                },
            ],
            "default_root_dir": "run",
        },
        "method": {"class_path": "OPDPlus"},
    }


def test_a_run_from_real_files_is_trained_resumed_tested_and_predicted_from(
    files: Path, okd: Type
) -> None:
    Path("tools.yaml").write_text(yaml.safe_dump(settings(files)))
    result = okd("fit", "--config", "tools.yaml", *QUIET)
    assert result.status == 0, result.err
    wanted = {"rollout/tool_calls", "rollout/tool_errors", "rollout/mean_turns"}
    wanted |= {"train/opd_plus", "train/reward", "rollout/reward", "val/exact_match"}
    assert wanted <= metric_names(RUN / "metrics.csv")
    metrics = read_metrics(RUN / "metrics.csv")
    assert sum(float(row.get("rollout/tool_calls", 0)) for row in metrics) > 0
    written = (RUN / "rollouts.jsonl").read_text()
    records = [json.loads(line) for line in written.splitlines()]
    answers = [t["text"] for r in records for t in r.get("turns", []) if t["by"] == "tools"]
    assert any("<tool_response>" in text for text in answers)
    shutil.copytree(RUN, "whole")
    kept = ["--ckpt_path", "kept/at-step=2.ckpt", "--trainer.default_root_dir", "run"]
    resumed = okd("fit", *kept)
    assert resumed.status == 0, resumed.err
    last = RUN / "checkpoints" / "last.ckpt"
    assert_same_weights(last, Path("whole") / "checkpoints" / "last.ckpt")
    assert read_metrics(RUN / "metrics.csv") == metrics
    assert (RUN / "rollouts.jsonl").read_text() == written
    tested = okd("test", "--ckpt_path", str(last))
    assert tested.status == 0, tested.err
    assert "test/on_policy_reverse_kl" in tested.out
    predicted = okd("predict", "--ckpt_path", str(last))
    assert predicted.status == 0, predicted.err
    lines = (RUN / "predictions.jsonl").read_text().splitlines()
    assert {json.loads(line)["stop_reason"] for line in lines} <= {"eos", "length", "turns"}
    first, last_record = json.loads(lines[0]), json.loads(lines[-1])
    assert "calculator" in last_record["text"].split(last_record["prompt"])[0]  # the tools shown
    assert "calculator" not in first["text"].split(first["prompt"])[0]


def test_toolalpacas_rows(files: Path, toolalpaca: ModuleType) -> None:
    rows = [json.loads(line) for line in (files / "train.jsonl").read_text().splitlines()]
    for row in rows[:-1]:
        assert row.keys() == {"messages", "tools", "response"}
        assert all(tool["function"]["parameters"]["type"] == "object" for tool in row["tools"])
    schema = toolalpaca.schema_of(
        "f", 'Does it.\nParameters: {"a": "Required. integer. How many", "b": "Words"}\nOutput: x'
    )["function"]
    assert schema["description"] == "Does it."
    assert schema["parameters"]["required"] == ["a"]
    kinds = {name: p["type"] for name, p in schema["parameters"]["properties"].items()}
    assert kinds == {"a": "integer", "b": "string"}


OWN_TOOL = """
from okd_lightning.tools import Tool

class Clock(Tool):
    name = "clock"
    description = "The time."
    parameters = {"type": "object", "properties": {}}

    def __init__(self, now: str = "12:00") -> None:
        self.now = now

    def __call__(self) -> str:
        return self.now
"""


@pytest.mark.filterwarnings("ignore:.*val_rollouts 2 has no effect in this run")
def test_tools_are_named_by_class(files: Path, okd: Type) -> None:
    config = settings(files)
    del config["data"]["tools"]
    config["trainer"].update(callbacks=[], max_steps=1, enable_checkpointing=False)
    config["data"].update(val=None, max_response_length=8)
    config["method"] = {"class_path": "GKD", "init_args": {"on_policy_fraction": 1.0}}
    Path("config.yaml").write_text(yaml.safe_dump(config))
    Path("my_tools.py").write_text(OWN_TOOL)
    result = okd(
        *("fit", "--config", "config.yaml", QUIET, "--data.tools+=Calculator"),
        *("--data.tools+=my_tools.Clock", "--data.tools.now", "11:11"),
    )
    assert result.status == 0, result.err
    saved = yaml.safe_load((RUN / "config.yaml").read_text())["data"]["tools"]
    assert [tool["class_path"] for tool in saved] == [
        "okd_lightning.tools.Calculator",
        "my_tools.Clock",
    ]
    assert saved[1]["init_args"] == {"now": "11:11"}


MISTAKES = [
    (["--data.tools+=Calculater"], ["--data.tools", "no such tool", "mean Calculator?"]),
    (["--data.tools+=os.system"], ["--data.tools", "os.system"]),
    (["--data.tools+=Tool"], ["--data.tools", "is abstract"]),
    (["--data.tools+=Calculator", "--data.tools+=Calculator"], ["2 tools called 'calculator'"]),
    (["--data.tools+=Calculator", "--data.tools.digits", "3"], ["Calculator has no setting"]),
    (
        ["--data.tools+=FunctionTool", "--data.tools.function", "os.system"],
        ["'os.system'; expected a Tool"],
    ),
    (["--data.tools+=Calculator", "--data.max_turns", "0"], ["max_turns must be at least 1"]),
    (["--data.tools+=Calculator"], ["data.tools", "no chat_template"]),
    (["--data.tools_column", "functions"], ["no column 'functions'", "--data.tools_column"]),
]


@pytest.mark.parametrize(("typed", "words"), MISTAKES, ids=lambda value: " ".join(value)[:40])
def test_mistakes_are_one_line(typed: list[str], words: list[str], assets: Assets, okd: Type):
    result = okd("fit", assets.models, assets.data, QUIET, "--method", "KD", typed)
    assert result.status != 0
    lines = result.err.strip().splitlines()
    assert len(lines) == 1, result.err
    for word in words:
        assert word in lines[0], lines[0]


def test_plain_rows_are_refused(files: Path, assets: Assets, okd: Type) -> None:
    models = ["--model.student", str(files / "student"), "--model.teacher", str(files / "teacher")]
    result = okd("fit", models, assets.data, QUIET, "--method", "KD", "--data.tools+=Calculator")
    assert result.status != 0
    assert "plain prompts, and --data.tools are called in chats" in result.err
    assert len(result.err.strip().splitlines()) == 1
