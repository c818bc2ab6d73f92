"""Frozen here: privileged teacher prompts and self-teachers from the command line.

* a real model teaches itself on real rows, from a config's template to an exported student, and a
  resumed run is the uninterrupted one, bit for bit;
* a config that says ``FrozenSelf`` survives its checkpoint;
* every mistake is one line that says what to do.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from cli_workbench import QUIET, Assets, Result, assert_same_weights, read_metrics, write_jsonl
from transformers import AutoModelForCausalLM

Type = Callable[..., Result]
RUN = Path("run")
LAST = RUN / "checkpoints" / "last.ckpt"
TEMPLATE = "{prompt}\n\nSolution: {reference}"
SETTINGS = {
    "data": {
        "prompt_column": "question",
        "response_column": "answer",
        "teacher_prompt_template": TEMPLATE,
        "max_prompt_length": 100,
        "max_teacher_prompt_length": 230,
        "max_response_length": 24,
        "prompts_per_epoch": 16,
        "batch_size": 2,
        "global_batch_size": 4,
        "val_rollouts": 4,
    },
    "method": {"class_path": "GKD", "init_args": {"on_policy_fraction": 1.0}},
}
KEPT = [
    *("--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.filename", "at-{step}"),
    *("--trainer.callbacks.dirpath", "kept", "--trainer.callbacks.every_n_train_steps", "1"),
    *("--trainer.callbacks.save_top_k", "-1"),
]
SELF_TEACHERS = {
    "frozen": ["--model.teacher", "FrozenSelf"],
    "ema": ["--model.teacher", "AveragedSelf", "--model.ema_decay", "0.9"],
    "live": ["--model.teacher", "LiveSelf"],
    "frozen, LoRA": [
        *("--model.teacher", "FrozenSelf", "--model.student_adapter", "LoraConfig"),
        *("--model.student_adapter.r", "4"),
    ],
}


@pytest.fixture
def real(here: Path, shared_data: Path) -> list[str]:
    """The first rows of GSM8K and a model of 75,504 parameters, as a config and its flags."""
    (here / "own.yaml").write_text(yaml.safe_dump(SETTINGS))
    for part, name, num in (("train", "train", 400), ("val", "test", 40)):
        lines = (shared_data / "datasets" / "gsm8k" / f"{name}.jsonl").read_text().splitlines()
        (here / f"{part}.jsonl").write_text("\n".join(lines[:num]) + "\n")
    return [
        *("--config", "own.yaml", "--model.student", str(shared_data / "models" / "student75K")),
        *("--data.train", "train.jsonl", "--data.val", "val.jsonl", *QUIET),
        *("--model.learning_rate", "1e-3", "--trainer.default_root_dir", "run"),
    ]


@pytest.mark.parametrize("kind", SELF_TEACHERS)
def test_a_real_model_teaches_itself(kind: str, real: list[str], okd: Type) -> None:
    options = [*real, *SELF_TEACHERS[kind], *KEPT, "--trainer.max_steps", "6"]
    result = okd("fit", options)
    assert result.status == 0, result.err
    assert "overlong teacher prompt" in result.log
    shutil.copytree(RUN, "whole")
    result = okd("fit", "--ckpt_path", "kept/at-step=3.ckpt")
    assert result.status == 0, result.err
    assert_same_weights(LAST, Path("whole/checkpoints/last.ckpt"))
    assert read_metrics(RUN / "metrics.csv") == read_metrics(Path("whole/metrics.csv"))
    numbers = [float(r["train/gkd"]) for r in read_metrics(RUN / "metrics.csv") if "train/gkd" in r]
    assert len(numbers) == 6
    assert min(numbers) > 1e-3
    result = okd("export", "--ckpt_path", str(LAST), "--out", "out")
    assert result.status == 0, result.err
    exported = AutoModelForCausalLM.from_pretrained("out")
    saved = torch.load(LAST, weights_only=True)["state_dict"]
    if "LoRA" not in kind:
        assert all(torch.equal(v, saved[f"student.{n}"]) for n, v in exported.named_parameters())
    own = SELF_TEACHERS[kind][1]
    assert f"* teacher: {own}\n" in Path("out/README.md").read_text()
    result = okd("test", "--ckpt_path", str(LAST))
    assert result.status == 0, result.err
    assert "test/forward_kl" in result.out


def test_the_run_says_what_it_does(fit: Type, assets: Assets) -> None:
    student = ["--model.student", assets.student, "--model.teacher", "FrozenSelf"]
    template = ["--data.teacher_prompt_template", "{prompt}"]
    result = fit("--method", "GKD", *student, *template, models=False)
    assert "the student is its own teacher (FrozenSelf)" in result.log
    config = yaml.safe_load((RUN / "config.yaml").read_text())
    assert config["data"]["teacher_prompt_template"] == "{prompt}"
    assert config["model"]["teacher"] == {"class_path": "okd_lightning.teachers.FrozenSelf"}


ROWS = [{"prompt": "ab=", "response": "c", "hint": "xyz"}, {"prompt": "a=", "response": ""}]
SELF = ["--model.teacher"]
TEMPLATED = "--data.teacher_prompt_template"
COLUMN = "--data.teacher_prompt_column"

MISTAKES = [
    ([TEMPLATED, "{promt}"], ["unknown field {promt}", "did you mean {prompt}?"]),
    ([TEMPLATED, "Think."], ["'Think.'", "names no field", "{reference}"]),
    ([TEMPLATED, "{prompt"], ["'{prompt'", "expected {prompt} and/or {reference}"]),
    ([TEMPLATED, "{prompt}", COLUMN, "hint"], [COLUMN, TEMPLATED, "either"]),
    ([COLUMN, "hnit"], ["no column 'hnit'", COLUMN, "did you mean 'hint'?"]),
    (["--data.max_teacher_prompt_length", "9"], ["9 has no effect", TEMPLATED]),
    (
        [COLUMN, "hint", "--data.max_teacher_prompt_length", "0"],
        ["max_teacher_prompt_length", "at least 1", "0"],
    ),
    (
        [COLUMN, "hint", "--data.max_teacher_prompt_length", "2"],
        ["all 2 rows", "overlong teacher prompt: 1", "no teacher prompt: 1", "have 3 to 3 tokens"],
    ),
    (
        [COLUMN, "hint", "--data.max_teacher_prompt_length", "2", "--data.on_overlong", "error"],
        ["row 1", "the teacher prompt has 3 tokens", "--data.max_teacher_prompt_length 2"],
    ),
    ([*SELF, "FrozenSelff"], ["--model.teacher FrozenSelff", "did you mean FrozenSelf?"]),
    ([*SELF, "FrozenSelf", "--model.teacher.k", "4"], ["FrozenSelf has no setting 'k'"]),
    (["--model.ema_decay", "0.5"], ["ema_decay 0.5 has no effect", "AveragedSelf"]),
]
ALONE = [
    ([*SELF, "AveragedSelf", "--model.ema_decay", "1"], ["ema_decay", "between 0 and 1", "1.0"]),
    ([*SELF, "LiveSelf"], ["LiveSelf without teacher prompts", TEMPLATED]),
    (
        [*SELF, "AveragedSelf", "--method", "OKD"],
        ["AveragedSelf follows", "--model.teacher FrozenSelf"],
    ),
    ([TEMPLATED, "{prompt}", "--method", "SFT"], ["no teacher to read", "FrozenSelf"]),
    (["--method", "KD"], ["kd needs a teacher", "--model.teacher FrozenSelf"]),
]


def check_line(result: Result, words: list[str]) -> None:
    (line,) = [line for line in result.err.splitlines() if line.startswith("okd-lightning: ")]
    assert result.status != 0
    assert "Traceback" not in result.err
    for word in words:
        assert word in line


@pytest.mark.parametrize(("options", "words"), MISTAKES)
def test_a_mistake_is_one_line(options, words, okd: Type, assets: Assets, here: Path) -> None:
    rows = write_jsonl(here / "rows.jsonl", ROWS)
    method = ["--method", "GKD", "--method.on_policy_fraction", "1", "--data.train", str(rows)]
    check_line(okd("fit", assets.models, method, QUIET, options), words)


@pytest.mark.parametrize(("options", "words"), ALONE)
def test_a_mistake_without_a_teacher(options, words, okd: Type, assets: Assets) -> None:
    data = [*assets.data, *QUIET]
    check_line(
        okd("fit", "--model.student", assets.student, data, "--method", "GKD", options), words
    )


def test_another_self_teacher_does_not_resume(fit: Type, okd: Type, assets: Assets) -> None:
    student = ["--model.student", assets.student, "--model.teacher", "FrozenSelf"]
    fit("--method", "KD", *student, "--trainer.max_steps", "1", models=False)
    line = okd("fit", "--ckpt_path", str(LAST), "--model.teacher", "AveragedSelf")
    check_line(line, ["checkpoint's teacher is FrozenSelf, this run's is AveragedSelf"])


def test_chat_rows_without_a_user(okd: Type, assets: Assets, here: Path) -> None:
    tokenizer = here / "chatting"
    shutil.copytree(assets.student, tokenizer)
    config = json.loads((tokenizer / "tokenizer_config.json").read_text())
    config["chat_template"] = "{% for m in messages %}{{ m.role[0] + m.content }}{% endfor %}"
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(config))
    chat = [{"role": "system", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = write_jsonl(here / "chats.jsonl", [{"messages": chat}])
    student = ["--model.student", str(tokenizer), "--model.teacher", "FrozenSelf"]
    options = ["--data.train", str(rows), "--method", "KD", TEMPLATED, "{prompt}", *QUIET]
    check_line(okd("fit", student, options), ["chats.jsonl, row 1", "no user message", COLUMN])
