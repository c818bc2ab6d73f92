"""Settings of a class that is named on the command line.

Frozen here: a class may be named after its settings; a setting whose class nobody names is refused
with an example; lists of classes, and classes of a config, stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from cli_workbench import QUIET, Assets, Result

from okd_lightning.commands.class_options import classes_first
from okd_lightning.errors import UsageError


@pytest.mark.parametrize(
    ("words", "ordered"),
    [
        ("--method.temperature 2 --method KD", "--method KD --method.temperature 2"),
        ("--method.a=2 --seed 1 --method=KD", "--method=KD --method.a=2 --seed 1"),
        (
            "--model.teacher.url U --model.teacher ServedTeacher",
            "--model.teacher ServedTeacher --model.teacher.url U",
        ),
        (
            "--trainer.callbacks+=A --trainer.callbacks.keep 3 --trainer.callbacks+=B",
            "--trainer.callbacks+=A --trainer.callbacks.keep 3 --trainer.callbacks+=B",
        ),
        ("--method.class_path=KD --method.b 2", "--method.class_path=KD --method.b 2"),
        ("--method.f.p 1 --method.f=R --method=X", "--method=X --method.f=R --method.f.p 1"),
        (
            "--model.teacher T --model.teacher.m.k 1 --model.teacher.m M",
            "--model.teacher T --model.teacher.m M --model.teacher.m.k 1",
        ),
        ("--model.teacher.model_type llama", "--model.teacher.model_type llama"),
    ],
)
def test_a_class_comes_before_its_settings(words: str, ordered: str) -> None:
    assert classes_first(words.split(), []) == ordered.split()


@pytest.mark.parametrize(
    ("words", "example"),
    [
        ("--model.student_adapter.r 4", "--model.student_adapter LoraConfig"),
        ("--model.engine.url http://x", "--model.engine VLLMServer"),
        ("--method.temperature=2", "--method KD"),
        ("--trainer.callbacks.keep 3", r"--trainer.callbacks\+=LastCheckpoint"),
    ],
)
def test_a_setting_without_a_class_is_refused(words: str, example: str) -> None:
    with pytest.raises(UsageError, match=f"none is named.*such as {example}$"):
        classes_first(words.split(), [{"model": {"learning_rate": 1e-3}, "trainer": None}])


def test_a_class_in_a_config_has_its_settings_typed() -> None:
    words = ["--trainer.callbacks.keep", "3", "--model.engine.url", "U"]
    trainer = {"callbacks+": [{"class_path": "LastCheckpoint"}]}
    config = {"trainer": trainer, "model": {"engine": "VLLMServer"}}
    assert classes_first(words, [config]) == words


def test_the_order_of_words_does_not_matter(
    okd: Callable[..., Result], assets: Assets, here: object
) -> None:
    base = [*assets.models, *assets.data, *QUIET, "--trainer.default_root_dir", "run"]
    adapter = ["--model.student_adapter.r", "2", "--model.student_adapter", "LoraConfig"]
    result = okd("fit", "--method.temperature", "2", base, adapter, "--method", "KD")
    assert result.status == 0, result.err


@pytest.mark.parametrize("words", ["--model.student_adapter.r 4", "--method.temperature 2"])
def test_the_hint_leads_to_training(
    okd: Callable[..., Result], assets: Assets, here: object, words: str
) -> None:
    base = [*assets.models, *assets.data, *QUIET, "--trainer.default_root_dir", "run"]
    base += ["--method", "KD"] if "adapter" in words else []
    refused = okd("fit", base, words.split())
    assert refused.status == 2
    hint = refused.err.strip().rpartition("such as ")[2]
    result = okd("fit", base, hint.split(), words.split())
    assert result.status == 0, result.err
