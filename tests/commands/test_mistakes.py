"""Frozen here: a mistake is one line on stderr with the remedy, and no file is lost.

Every row of the table is a command with a mistake and the words that its line must hold. The exit
status is not zero, there is no traceback, and the run that lies in the folder stays as it was.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_workbench import QUIET, STUDENT_FIELDS, Assets, Result, save_model, write_jsonl

Type = Callable[..., Result]
RUN = Path("run")

FILES = {
    "empty.jsonl": "",
    "broken.jsonl": '{"prompt": "a", "response": "b"}\n{"prompt": "a", \n',
    "list.jsonl": "[1, 2]\n",
    "columns.jsonl": '{"question": "a", "answer": "b"}\n',
    "types.jsonl": '{"prompt": "a", "response": "b"}\n{"prompt": 3, "response": "b"}\n',
    "prompts.jsonl": '{"prompt": "abc"}\n',
    "responses.jsonl": '{"response": "abc"}\n',
    "long.jsonl": json.dumps({"prompt": "a" * 40, "response": "b"}) + "\n",
    "table.csv": "prompt;response\na;b\n",
    "broken.yaml": "model:\n  student: [a\nmethod: KD\n",
    "list.yaml": "- a\n- b\n",
    "empty.yaml": "",
    "section.yaml": "modle:\n  student: a\n",
    "key.yaml": "model:\n  studnet: a\n",
    "type.yaml": "model:\n  learning_rate: fast\n",
    "int.yaml": "data:\n  batch_size: two\n",
    "method.yaml": "method:\n  class_path: KD\n  init_args:\n    temprature: 3\n",
    "afile": "x",
    "empty.ckpt": "",
}

RATE = ["--model.learning_rate"]
KD = ["--method", "KD"]
DIVERGENCE = ["--method", "DivergenceCallback", "--method.divergence"]
LORA = ["--model.student_adapter", "LoraConfig"]

REWARD = ["--method", "Reward"]

FIT = [
    # methods in parts
    (REWARD, ["--method.function must be given"]),
    ([*REWARD, "--method.function", "AnswerMatc"], ["no such reward", "did you mean AnswerMatch?"]),
    (["--method", "AdvantageCallback", "--method.advantage", "Nope"], ["no such advantage"]),
    (["--method", "Stage"], ["--method.method must be given"]),
    (
        ["--method", "OPDPlus", "--method.divergence", "TopK"],
        ["--method.divergence.divergence and --method.divergence.k must be given"],
    ),
    (
        [*REWARD, "--method.function", "AnswerMatch", "--method.baseline", "leave_one_out"],
        ["one", "--data.samples_per_prompt 2"],
    ),
    # data
    ([*KD, "--data.train", "nope.jsonl"], ["nope.jsonl", "no such file"]),
    ([*KD, "--data.train", "emty.jsonl"], ["did you mean", "empty.jsonl"]),
    ([*KD, "--data.train", "no/such/folder.jsonl"], ["no folder"]),
    ([*KD, "--data.train", "empty.jsonl"], ["empty.jsonl", "no rows"]),
    ([*KD, "--data.train", "broken.jsonl"], ["broken.jsonl, line 2", "not valid JSON"]),
    ([*KD, "--data.train", "list.jsonl"], ["line 1", "a list", "JSON object"]),
    ([*KD, "--data.train", "table.csv"], ["table.csv", "semicolons"]),
    (
        [*KD, "--data.train", "columns.jsonl"],
        ["no column 'prompt'", "'question', 'answer'", "--data.prompt_column question"],
    ),
    ([*KD, "--data.prompt_column", "ask"], ["no column 'ask'", "'prompt', 'response'"]),
    ([*KD, "--data.train", "types.jsonl"], ["types.jsonl, row 2", "int", "expected text"]),
    ([*KD, "--data.train", "prompts.jsonl"], ["no column 'response'", "found: 'prompt'"]),
    (
        ["--method", "GKD", "--method.on_policy_fraction", "1", "--data.train", "responses.jsonl"],
        ["no column 'prompt'", "'response'"],
    ),
    ([*KD, "--data.train", "long.jsonl"], ["all 1 rows were skipped", "--data.max_prompt_length"]),
    (
        [*KD, "--data.train", "long.jsonl", "--data.on_overlong", "error"],
        ["long.jsonl, row 1", "40 tokens", "--data.max_prompt_length 16"],
    ),
    ([*KD, "--data.on_overlong", "drop"], ["--data.on_overlong", "skip or error", "'drop'"]),
    (
        [*KD, "--data.max_response_length", "200"],
        ["the context of the student is 128", "--data.max"],
    ),
    ([*KD, "--data.batch_size", "0"], ["data.batch_size", "at least 1", "0"]),
    ([*KD, "--data.batch_size", "two"], ["--data.batch_size", "a whole number", "'two'"]),
    (["--method", "GKD", "--data.samples_per_prompt", "3"], ["samples_per_prompt 3", "divide"]),
    ([*KD, "--data.global_batch_size", "3"], ["global_batch_size 3", "not a multiple"]),
    (
        [*KD, "--data.global_batch_size", "4", "--trainer.accumulate_grad_batches", "3"],
        ["accumulate_grad_batches 3 contradicts", "global_batch_size 4"],
    ),
    ([*KD, "--data.prompts_per_rollout", "3"], ["prompts_per_rollout 3", "whole number of"]),
    ([*KD, "--data.sampling.temperature", "-1"], ["sampling.temperature", "-1"]),
    ([*KD, "--data.sampling.temperatur", "1"], ["Sampling has no setting", "mean temperature?"]),
    ([*KD, "--data.sampling", "greedy"], ["--data.sampling", "'greedy'"]),
    # names of other trainers
    ([*KD, "--model.lr", "1e-4"], ["--model.lr;", "--model.learning_rate"]),
    (["--method", "GKD", "--method.lmbda", "1"], ["'lmbda'", "--method.on_policy_fraction"]),
    ([*KD, "--output_dir", "x"], ["--output_dir;", "--trainer.default_root_dir"]),
    ([*KD, "--per_device_train_batch_size=4"], ["here it is --data.batch_size"]),
    ([*KD, "--data.sampling.max_new_tokens", "4"], ["--data.max_response_length"]),
    ([*KD, "--trainer.bf16", "true"], ["--trainer.precision bf16-mixed"]),
    ([*KD, "--model", "{lr: 1}"], ["'model.lr'", "--model.learning_rate"]),
    (
        [*KD, "--data.sampling.min_p", "0.1"],
        ["no such option here", "sampled from the student itself"],
    ),
    # two options for one quantity
    (
        [
            *KD,
            "--model.optimizer",
            "SGD",
            "--model.optimizer.lr",
            "1",
            "--model.learning_rate",
            "2",
        ],
        ["--model.learning_rate 2 and --model.optimizer.lr 1", "leave one of them out"],
    ),
    (
        [*KD, "--model.lr_scheduler", "ConstantLR", "--model.warmup_steps", "2"],
        ["model.warmup_steps 2 has no effect with model.lr_scheduler"],
    ),
    # methods
    (
        [
            *("--method", "Reward", "--method.function", "PlainFunction"),
            *("--method.function.function", "os.system"),
        ],
        ["'os.system'; expected a RewardFunction"],
    ),
    (["--method", "KDD"], ["--method KDD", "no such method", "did you mean KD?", "GKD"]),
    (["--method", "gkd"], ["did you mean GKD?"]),
    (["--method", "ModelCheckpoint"], ["no such method"]),
    (["--method", "DistillationCallback"], ["abstract", "GKD"]),
    (["--method", "no_plugin.mine.My"], ["no_plugin.mine.My", "cannot be imported"]),
    ([], ["no method", "--method"]),
    ([*KD, "--method.temprature", "2"], ["KD has no setting 'temprature'", "mean temperature?"]),
    ([*KD, "--method.temperature", "-1"], ["temperature", "-1", "positive"]),
    ([*KD, "--method.temperature", "hot"], ["--method.temperature", "a number", "'hot'"]),
    ([*KD, "--method.weight", "0"], ["weight", "above 0"]),
    (["--method", "GKD", "--method.beta", "1.5"], ["beta is 1.5", "[0, 1]"]),
    (
        ["--method", "GKD", "--method.on_policy_fraction", "1.5"],
        ["on_policy_fraction", "between 0 and 1", "1.5"],
    ),
    (
        ["--method", "GKD", "--method.beta", "0.1", "--method.divergence", "ForwardKL"],
        ["beta (0.1) or divergence (ForwardKL())", "not both"],
    ),
    (
        [*DIVERGENCE, "JensenShannn"],
        ["--method.divergence JensenShannn", "no such divergence", "mean JensenShannon?"],
    ),
    (
        [*DIVERGENCE, "JensenShannon", "--method.divergence.betta", "1"],
        ["JensenShannon has no setting 'betta'", "did you mean beta?"],
    ),
    ([*DIVERGENCE, "JensenShannon", "--method.divergence.beta", "7"], ["beta is 7.0", "[0, 1]"]),
    (
        [*DIVERGENCE, "JensenShannon", "--method.divergence.beta", "x"],
        ["--method.divergence.beta", "a number", "'x'"],
    ),
    ([*KD, "--trainer.callbacks+=KD"], ["two methods", "'kd'", "name"]),
    ([*KD, "--trainer.callbacks+=Nope"], ["Nope", "no such callback"]),
    (
        [*KD, "--trainer.callbacks+=GKD", "--trainer.callbacks.betta", "1"],
        ["GKD has no setting 'betta'", "did you mean beta?"],
    ),
    (
        [*KD, "--trainer.callbacks+=ExactMatch", "--trainer.callbacks.pattern", "("],
        ["not a regular expression"],
    ),
    (
        [*KD, "--trainer.callbacks+=LastCheckpoint", "--trainer.callbacks.every_n_steps", "0"],
        ["every_n_steps", "at least 1"],
    ),
    # models
    ([*KD, "--model.student", "/no/such"], ["--model.student '/no/such'", "no such folder"]),
    ([*KD, "--model.student", "some/id"], ["'some/id'", "neither a folder nor in the local cache"]),
    ([*KD, "--model.teacher", "empty"], ["--model.teacher 'empty'", "config.json"]),
    ([*KD, "--model.teacher", "[a, b]"], ["TeacherEnsemble --model.teacher.teachers '[a, b]'"]),
    ([*KD, "--model.teacher", "swapped"], ["tokenizers differ", "2 tokens", "sizes 258 and 258"]),
    ([*KD, "--model.student", "{model_type: lama}"], ["model_type 'lama'", "did you mean llama?"]),
    ([*KD, "--model.student", "{hidden_size: 3}"], ["needs model_type", "hidden_size"]),
    (
        [*KD, "--model.student", "{model_type: llama, hidden_size: big}"],
        ["--model.student", "hidden_size", "'big'"],
    ),
    (
        [*KD, "--model.student", "{model_type: llama, hidden_size: 16, num_attention_heads: 3}"],
        ["--model.student", "not a multiple"],
    ),
    ([*KD, "--model.dtype", "float8"], ["--model.dtype", "bfloat16", "'float8'"]),
    ([*KD, "--model.schedule", "cosin"], ["constant or linear or cosine", "'cosin'"]),
    ([*KD, "--model.learning_rate", "-1"], ["learning_rate", "-1"]),
    ([*KD, "--model.learning_rate", "-1e-3"], ["learning_rate must be", "got -0.001"]),
    ([*KD, "--model.weight_decay", "-.inf"], ["weight_decay must be", "got -inf"]),
    ([*KD, "--trainer.gradient_clip_val", "-1"], ["gradient_clip_val must be", "got -1"]),
    ([*KD, "--data.batch_size", ""], ["--data.batch_size: expected a whole number, got ''"]),
    ([*KD, "--data.on_overlong", ""], ["--data.on_overlong: expected skip or error, got ''"]),
    ([*KD, "--model.warmup_steps", "-1"], ["warmup_steps", "-1"]),
    ([*KD, "--model.optimizer", "Adamm"], ["Adamm", "no such optimizer", "did you mean Adam?"]),
    (
        [*KD, "--model.optimizer", "AdamW", "--model.optimizer.lrr", "1"],
        ["AdamW has no setting 'lrr'", "did you mean lr?"],
    ),
    ([*KD, "--model.optimizer", "AdamW", "--model.optimizer.lr", "x"], ["optimizer.lr", "'x'"]),
    ([*KD, "--model.student_adapter", "LoraConfg"], ["LoraConfg", "did you mean LoraConfig?"]),
    ([*KD, *LORA, "--model.student_adapter.rr", "3"], ["LoraConfig has no setting 'rr'"]),
    (
        [*KD, *LORA, "--model.student_adapter.target_modules", "[nope]"],
        ["nope", "q_proj", "v_proj"],
    ),
    # trainer
    ([*KD, "--trainer.default_root_dir", "afile"], ["'afile'", "cannot be written"]),
    ([*KD, "--trainer.default_root_dir", "afile/sub"], ["'afile/sub'", "cannot be written"]),
    ([*KD, "--trainer.val_check_interval", "0"], ["val_check_interval", "at least 1"]),
    ([*KD, "--trainer.precision", "foo"], ["--trainer.precision", "bf16-mixed", "'foo'"]),
    ([*KD, "--trainer.strategy", "xyz"], ["xyz", "ddp"]),
    ([*KD, "--trainer.max_steps", "many"], ["--trainer.max_steps", "'many'"]),
    ([*KD, "--trainer.max_step", "3"], ["unknown option --trainer.max_step", "max_steps?"]),
    ([*KD, "--seed_everything", "x"], ["--seed_everything", "a whole number", "'x'"]),
    # the line itself
    ([*KD, "--metod", "x"], ["unknown option --metod", "did you mean --method?"]),
    ([*KD, "--batch_size", "3"], ["--batch_size", "here it is --data.batch_size"]),
    ([*KD, "--data.bathc_size", "3"], ["did you mean --data.batch_size?"]),
    (["--method"], ["--method", "value"]),
    ([*KD, "--config"], ["--config", "value"]),
    ([*KD, "--ckpt_path"], ["--ckpt_path", "value"]),
    ([*KD, "--ckpt", "x.ckpt"], ["unknown option --ckpt", "did you mean --ckpt_path?"]),
    ([*KD, "junk"], ["'junk'"]),
    # configs
    ([*KD, "--config", "nope.yaml"], ["'nope.yaml'", "no such file"]),
    ([*KD, "--config", "broken.yaml"], ["'broken.yaml', line 3", "YAML"]),
    ([*KD, "--config", "list.yaml"], ["'list.yaml'", "model:", "list"]),
    ([*KD, "--config", "empty.yaml"], ["'empty.yaml'", "empty file"]),
    ([*KD, "--config", "section.yaml"], ["modle.student", "here it is --model.student"]),
    ([*KD, "--config", "key.yaml"], ["model.studnet", "did you mean model.student?"]),
    ([*KD, "--config", "type.yaml"], ["--model.learning_rate", "a number", "'fast'"]),
    ([*KD, "--config", "int.yaml"], ["--data.batch_size", "a whole number", "'two'"]),
    (["--config", "method.yaml"], ["KD has no setting 'temprature'", "mean temperature?"]),
    # checkpoints
    ([*KD, "--ckpt_path", "nope.ckpt"], ["'nope.ckpt'", "no such file", "good.ckpt"]),
    ([*KD, "--ckpt_path", "cut.ckpt"], ["'cut.ckpt'", "cut off or broken", "good.ckpt"]),
    ([*KD, "--ckpt_path", "empty.ckpt"], ["'empty.ckpt'", "cut off or broken"]),
    ([*KD, "--ckpt_path", "afile"], ["'afile'", "no checkpoint of okd-lightning"]),
    ([*KD, "--ckpt_path", "foreign.ckpt"], ["'foreign.ckpt'", "not written by okd-lightning"]),
    ([*KD, "--ckpt_path", "python.ckpt"], ["'python.ckpt'", "no checkpoint of okd-lightning"]),
    (["--method", "SFT", "--ckpt_path", "good.ckpt"], ["of KD", "configured for SFT"]),
    (
        ["--ckpt_path", "good.ckpt", "--model.student", "narrow"],
        ["narrow", "would have no effect at a resume", "start a new run"],
    ),
    (
        ["--ckpt_path", "good.ckpt", "--model.student", "deep"],
        ["deep", "would have no effect at a resume", "start a new run"],
    ),
    (["--ckpt_path", "good.ckpt", "--data.batch_size", "4"], ["4 rows", "global_batch_size 2"]),
]

OTHERS = [
    (["fti"], ["unknown command 'fti'", "did you mean fit?"]),
    (["fit", *KD], ["--model.student", "--config"]),
    (["validate"], ["--model.student"]),
    (["validate", "--ckpt_path", "nope.ckpt"], ["no such file"]),
    (["test", "--model.student", "STUDENT"], ["--data.test"]),
    (["validate", "--model.student", "STUDENT"], ["--data.val"]),
    (["predict", "--model.student", "STUDENT"], ["--data.predict"]),
    (["predict", "--ckpt_path", "good.ckpt", "--data.predict", "empty.jsonl"], ["no rows"]),
    (["fit", "--method", "SFT", "--model.student", "STUDENT"], ["--data.train"]),
    (
        ["fit", *KD, "--model.student", "STUDENT", "--data.train", "TRAIN"],
        ["kd needs a teacher", "--model.teacher"],
    ),
    (
        ["fit", "--method", "SFT", "--method.seq_kd", "true", "--model.student", "STUDENT"],
        ["sft needs a teacher", "--model.teacher"],
    ),
    (
        ["fit", "--method", "SFT", "--model.student", "{model_type: llama}", "--data.train", "x"],
        ["no tokenizer", "--model.tokenizer"],
    ),
    (["export", "--ckpt_path", "good.ckpt"], ["--out must be given"]),
    (["export", "--out", "x"], ["--ckpt_path must be given"]),
    (["export", "--ckpt_path", "nope.ckpt", "--out", "x"], ["no such file", "good.ckpt"]),
    (["export", "--ckpt_path", "good.ckpt", "--out", "afile"], ["--out", "cannot be written"]),
    (
        ["export", "--ckpt_path", "good.ckpt", "--out", "x", "--adapter", "none"],
        ["--adapter", "merged or apart", "'none'"],
    ),
    (["export", "--ckpt_path", "good.ckpt", "--aut", "x"], ["--aut", "did you mean --out?"]),
]


def name(value: Any) -> str:
    return " ".join(value)[-60:]


@pytest.fixture(scope="module")
def workshop(assets: Assets, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with broken files, other models, and one run that must stay unchanged."""
    from okd_lightning.__main__ import main

    folder = tmp_path_factory.mktemp("mistakes")
    for file, text in FILES.items():
        (folder / file).write_text(text)
    (folder / "empty").mkdir()
    save_model(folder / "swapped", seed=1, swapped=True)
    narrow = {**STUDENT_FIELDS, "hidden_size": 16, "intermediate_size": 24}
    save_model(folder / "narrow", seed=1, fields=narrow)
    save_model(folder / "deep", seed=1, fields={**STUDENT_FIELDS, "num_hidden_layers": 3})
    torch.save({"state_dict": {}}, folder / "foreign.ckpt")
    torch.save({"okd_lightning": Path("x")}, folder / "python.ckpt")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        base = [*assets.models, *assets.data, *QUIET, "--trainer.default_root_dir", "run"]
        assert main(["fit", *KD, *base, "--trainer.max_steps", "3"]) == 0
    good = (folder / "run" / "checkpoints" / "last.ckpt").read_bytes()
    (folder / "good.ckpt").write_bytes(good)
    (folder / "cut.ckpt").write_bytes(good[: len(good) // 2])
    return folder


@pytest.fixture
def spoil(
    workshop: Path, okd: Type, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[list[str], list[str]], None]]:
    """Type a command with a mistake: one line with these words, and nothing changed."""
    monkeypatch.chdir(workshop)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    before = contents(RUN)

    def type_mistake(argv: list[str], words: list[str]) -> None:
        result = okd(*argv)
        lines = [line for line in result.err.splitlines() if line.startswith("okd-lightning: ")]
        lines = [line for line in lines if not line.startswith("okd-lightning: warning: ")]
        assert result.status not in (0, None)
        assert "Traceback" not in result.err
        assert len(lines) == 1, result.err
        assert len(lines[0]) < 700
        missing = [word for word in words if word not in lines[0]]
        assert not missing, lines[0]

    yield type_mistake
    assert contents(RUN) == before


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a run but the event files that a logger opens in it."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(p): p.read_bytes() for p in files if not p.name.startswith("events")}


@pytest.mark.filterwarnings("ignore:.*settings .* are dropped")
@pytest.mark.parametrize(("argv", "words"), FIT, ids=name)
def test_fit(spoil: Callable[..., None], assets: Assets, argv: list[str], words: list[str]) -> None:
    base = [*assets.models, *assets.data, *QUIET, "--trainer.default_root_dir", "run"]
    spoil(["fit", *base, *argv], words)


@pytest.mark.parametrize(("argv", "words"), OTHERS, ids=name)
def test_other_commands(
    spoil: Callable[..., None], assets: Assets, argv: list[str], words: list[str]
) -> None:
    paths = {"STUDENT": assets.student, "TRAIN": assets.train}
    spoil([paths.get(word, word) for word in argv], words)


def test_debug_shows_the_traceback(okd: Type, assets: Assets) -> None:
    from okd_lightning.errors import DataNotFoundError

    with pytest.raises(DataNotFoundError):
        okd("fit", assets.models, KD, "--data.train", "nope.jsonl", "--debug")


def test_broken_rows_are_reported_before_weights_are_read(okd: Type, here: Path) -> None:
    save_model(here / "hollow", seed=1)
    (here / "hollow" / "model.safetensors").write_bytes(b"no weights")
    rows = [{"prompt": "a", "response": "b"}, {"prompt": 3, "response": "b"}]
    write_jsonl(here / "rows.jsonl", rows)
    models = ["--model.student", "hollow", "--model.teacher", "hollow"]
    typed = okd(
        "fit", KD, models, QUIET, "--data.train", "rows.jsonl", "--model.tokenizer", "hollow"
    )
    assert typed.status == 1
    assert "rows.jsonl, row 2: the prompt ('prompt') is int" in typed.err
