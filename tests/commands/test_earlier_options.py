"""Options of earlier versions for the teacher: typed, and in a checkpoint.

Frozen here: a typed one ends in one line with its present spelling, and a run begins with that
spelling; the same in a config file; a checkpoint with earlier settings continues as the run that
has the present ones, on the command line and from Python.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from cli_workbench import QUIET, Assets, Result, assert_same_weights
from fake_vllm_server import FakeVLLM, serving
from transformers import AutoModelForCausalLM, AutoTokenizer

from okd_lightning.teachers import AveragedSelf, CachedTeacher, FrozenSelf, NoTeacher
from okd_lightning.training.earlier_options import present_mark, present_model
from okd_lightning.training.module import DistillationModule

Type = Callable[..., Result]
LAST = Path("run/checkpoints/last.ckpt")
TEMPLATE = ("--data.teacher_prompt_template", "{prompt}{reference}")


@pytest.fixture
def url(assets: Assets):
    model = AutoModelForCausalLM.from_pretrained(assets.teacher)
    with serving(FakeVLLM(model, AutoTokenizer.from_pretrained(assets.teacher))) as engine:
        yield engine.url


TYPED = [
    ("--model.self_teacher frozen", "--model.teacher FrozenSelf"),
    ("--model.self_teacher ema", "--model.teacher AveragedSelf"),
    ("--model.self_teacher live", "--model.teacher LiveSelf"),
    (
        "--model.teacher {teacher} --model.teacher_cache cache --model.teacher_cache.k 4",
        "--model.teacher CachedTeacher --model.teacher.model {teacher} "
        "--model.teacher.folder cache --model.teacher.k 4",
    ),
    (
        "--model.teacher_cache.folder=cache --model.teacher={teacher}",
        "--model.teacher CachedTeacher --model.teacher.model {teacher} "
        "--model.teacher.folder cache",
    ),
    (
        "--model.teacher_server {url} --model.teacher_server.k 5",
        "--model.teacher ServedTeacher --model.teacher.url {url} --model.teacher.k 5",
    ),
    ("--model.teacher {teacher} --model.teacher_cache null", ""),
]


@pytest.mark.parametrize(("typed", "spelling"), TYPED)
def test_a_typed_one_is_refused_and_its_hint_begins_a_run(typed, spelling, okd, assets, url):
    there = {"teacher": assets.teacher, "url": url}
    run = ["fit", "--method", "KD", *assets.data, *QUIET, *TEMPLATE, "--trainer.max_steps", "1"]
    run += ["--model.student", assets.student, "--trainer.default_root_dir", "run"]
    result = okd(*run, shlex.split(typed.format(**there)))
    assert result.status == 2
    (line,) = result.err.strip().splitlines()
    _, _, hint = line.partition(" is no longer an option: ")
    assert hint == (f"give {spelling.format(**there)}" if spelling else "leave it out")
    words = (
        shlex.split(hint.removeprefix("give ")) if spelling else ["--model.teacher", assets.teacher]
    )
    begun = okd(*run, words)
    assert begun.status == 0, begun.err
    assert LAST.exists()


def test_one_in_a_config_file(okd, assets):
    config = {"model": {"student": assets.student, "teacher_server": {"url": "http://h", "k": 8}}}
    Path("own.yaml").write_text(yaml.safe_dump(config))
    result = okd("fit", "--config", "own.yaml", "--method", "KD", *assets.data)
    assert result.status == 2
    assert "give --model.teacher ServedTeacher " in result.err
    assert "--model.teacher.url http://h" in result.err
    assert len(result.err.strip().splitlines()) == 1


def in_earlier_words(checkpoint: Path, **model) -> None:
    """Rewrite the settings of ``model`` in a checkpoint, as an earlier version would hold them."""
    content = torch.load(checkpoint, weights_only=True)
    own = content["okd_lightning"]
    config = yaml.safe_load(own["config"])
    del config["model"]["teacher"]
    config["model"] |= model
    own["config"] = yaml.safe_dump(config)
    own["arguments"] = {n: v for n, v in own["arguments"].items() if n != "teacher"} | model
    own["self_teacher"] = model.get("self_teacher")
    own.pop("teacher")
    torch.save(content, checkpoint)


@pytest.mark.parametrize("name", ["averaged", "cached"])
def test_a_checkpoint_in_earlier_words_continues(name, fit: Type, okd: Type, assets: Assets):
    cached = ["CachedTeacher", "--model.teacher.model", assets.teacher]
    words, earlier, kind = {
        "averaged": (["AveragedSelf"], {"self_teacher": "ema", "teacher": None}, AveragedSelf),
        "cached": (
            [*cached, "--model.teacher.folder", "cache"],
            {"teacher": assets.teacher, "teacher_cache": "cache"},
            CachedTeacher,
        ),
    }[name]
    options = ["--model.student", assets.student, "--model.teacher", *words, *TEMPLATE]
    options += ["--method", "KD", "--method.cross_entropy_weight", "0.5"]
    whole = ["--trainer.default_root_dir", "whole", "--trainer.max_steps", "2"]
    fit(options, whole, models=False)
    fit(options, "--trainer.max_steps", "1", models=False)
    in_earlier_words(LAST, **earlier)
    kept = DistillationModule.load_from_checkpoint(str(LAST)).pair.given_teacher
    assert type(kept) is kind
    resumed = okd("fit", "--ckpt_path", str(LAST), "--trainer.max_steps", "2", "--trust_checkpoint")
    assert resumed.status == 0, resumed.err
    assert_same_weights(LAST, Path("whole/checkpoints/last.ckpt"))


def test_translation():
    plain = {"student": "S", "teacher": "T", "ema_decay": 0.9}
    assert present_model(plain) == plain
    nothing = {"self_teacher": None, "teacher_cache": None, "teacher_server": None}
    assert present_model({**plain, **nothing}) == plain
    unknown = {"kept": "code", "value": None}  # settings that an earlier checkpoint did not hold
    assert present_model({**plain, "teacher_cache": unknown}) == plain
    served = present_model({"teacher": None, "teacher_server": {"url": "u", "model": None}})
    assert served["teacher"] == {
        "class_path": "okd_lightning.teachers.ServedTeacher",
        "init_args": {"url": "u"},
    }
    assert present_mark({"self_teacher": "frozen"}) == FrozenSelf().mark
    assert present_mark({"self_teacher": None}) == NoTeacher().mark
    assert present_mark({"teacher": "AveragedSelf"}) == "AveragedSelf"
