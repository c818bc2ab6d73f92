"""Frozen here: ``okd-lightning shrink`` writes a student that transformers loads and fit trains.

* tokenizer, chat template and generation config come along; the record and the card say what was
  cut and what it cost;
* rows are read as fit reads them, chats included; without data the model's own samples are taken;
* a .gguf file with all its layers becomes a folder of the same weights, without measuring;
* a mistake is one line; a folder with files, or of the teacher, is left as it is; a failure leaves
  no half folder;
* distillation from the cut start ends closer to the teacher than from random weights.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from cli_workbench import Assets, Result, make_rows, save_model, write_jsonl
from quantised_models import write_gguf
from safetensors import SafetensorError
from tiny import make_trainer
from tokenizers import pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from okd_lightning import KD, DistillationModule, RolloutDataModule
from okd_lightning.commands.quickstart.recipe import TEACHER_DIR, TRAIN_FILE, VAL_FILE

Okd = Callable[..., Result]
FIELDS = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "eos_token_id": 1,
    "bos_token_id": 0,
}
TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
LENGTHS = ["--data.max_prompt_length", "24", "--data.max_response_length", "8"]
QUICK = ["--rows", "4", "--tried", "2", "--device", "cpu"]


@pytest.fixture
def teacher(here: Path) -> str:
    """A model of four layers with a chat template and its own generation settings."""
    save_model(here / "teacher", seed=3, scale=5.0, fields=FIELDS)
    GenerationConfig(eos_token_id=[1, 7], temperature=0.7, do_sample=True).save_pretrained(
        "teacher"
    )
    tokenizer = AutoTokenizer.from_pretrained("teacher")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained("teacher")
    return "teacher"


def record() -> dict:
    return json.loads(Path("student/shrink.json").read_text())


def test_a_student_for_fit(okd: Okd, teacher: str, assets: Assets) -> None:
    widths = ["--intermediate", "0.5", "--heads", "2", "--hidden", "0.75"]
    data = ["--data.train", assets.train, *LENGTHS]
    result = okd(
        "shrink", "--model", teacher, "--layers", "2", widths, QUICK, data, "--out", "student"
    )
    assert result.status == 0, result.err
    student = AutoModelForCausalLM.from_pretrained("student")
    config = student.config
    assert (config.num_hidden_layers, config.num_attention_heads) == (2, 2)
    assert (config.intermediate_size, config.hidden_size, config.head_dim) == (24, 24, 8)
    assert student.generation_config.eos_token_id == [1, 7]
    assert student.generation_config.temperature == 0.7
    assert AutoTokenizer.from_pretrained("student").chat_template == TEMPLATE
    written = record()
    assert len(written["kept_layers"]) == 2
    assert written["parameters"] == sum(p.numel() for p in student.parameters())
    assert len(written["candidates"]) >= 2 * 2 + 3
    assert [step["cut"].split()[0] for step in written["steps"]] == [
        *("layers", "intermediate_size", "heads", "hidden")
    ]
    assert all(f"KL {step['forward_kl']:.4f}" in result.out for step in written["steps"])
    card = Path("student/README.md").read_text()
    assert all(step["cut"] in card for step in written["steps"])
    models = ["--model.student", "student", "--model.teacher", teacher]
    steps = ["--trainer.max_steps", "1", "--trainer.accelerator", "cpu"]
    fitted = okd("fit", models, data, steps, "--method", "KD", "--data.batch_size", "2")
    assert fitted.status == 0, fitted.err


def test_named_layers_on_chats_and_on_samples(okd: Okd, teacher: str, here: Path) -> None:
    chat = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}]
    rows = write_jsonl(here / "chats.jsonl", [{"messages": chat}] * 3)
    named = ["shrink", "--model", teacher, "--drop_layers", "0,2-3", *QUICK]
    result = okd(named, "--data.train", str(rows), LENGTHS, "--out", "student")
    assert result.status == 0, result.err
    assert (record()["kept_layers"], record()["calibration"]) == ([1], "the dataset")
    assert record()["tokens"] == 3 * (len("cd;") + 1)  # the answer and its end, as in fit
    teacher_weights = AutoModelForCausalLM.from_pretrained(teacher).state_dict()
    own = AutoModelForCausalLM.from_pretrained("student").state_dict()
    name = "model.layers.{}.mlp.up_proj.weight"
    assert torch.equal(own[name.format(0)], teacher_weights[name.format(1)])
    result = okd(named, "--out", "sampled")
    assert result.status == 0, result.err
    assert "texts are sampled from the model" in result.out
    same = AutoModelForCausalLM.from_pretrained("sampled").state_dict()
    assert all(torch.equal(own[name], same[name]) for name in own)


def test_a_gguf_file_is_converted_as_it_is(okd: Okd, here: Path) -> None:
    model = tiny.make_llama(1)
    write_gguf(here / "model.gguf", model, is_quantised=False, split="smollm")
    result = okd("shrink", "--model", "model.gguf", "--layers", "2", "--out", "plain")
    assert result.status == 0, result.err
    assert "the whole model, nothing cut, written to" in result.out
    assert not Path("plain/shrink.json").exists()
    plain = AutoModelForCausalLM.from_pretrained("plain")
    for name, weight in plain.state_dict().items():
        torch.testing.assert_close(weight, model.state_dict()[name], rtol=0, atol=0)
    tokenizer = AutoTokenizer.from_pretrained("plain")
    assert isinstance(tokenizer.backend_tokenizer.pre_tokenizer, pre_tokenizers.Sequence)


def test_prompts_alone_and_a_number_format(okd: Okd, teacher: str, here: Path) -> None:
    rows = write_jsonl(here / "p.jsonl", [{"prompt": row["prompt"]} for row in make_rows(4, 1)])
    words = ["shrink", "--model", teacher, "--layers", "3", "--dtype", "bfloat16", *QUICK]
    result = okd(words, "--data.train", str(rows), LENGTHS, "--out", "student")
    assert result.status == 0, result.err
    assert AutoModelForCausalLM.from_pretrained("student", dtype="auto").dtype == torch.bfloat16


MISTAKES = [
    (["--layers", "5"], 1, ["--layers 5", "has 4 layers"]),
    (["--layers", "0"], 1, ["--layers 0"]),
    (["--layers", "two"], 2, ["--layers", "whole number"]),
    (["--layer", "2"], 2, ["--layer", "did you mean --layers?"]),
    ([], 2, ["nothing to cut", "--layers"]),
    (["--layers", "2", "--drop_layers", "1"], 2, ["--layers and --drop_layers"]),
    (["--drop_layers", "3-5"], 1, ["--drop_layers '3-5'", "numbered 0 to 3"]),
    (["--drop_layers", "0-3"], 1, ["no layer would stay"]),
    (["--drop_layers", "2-1"], 2, ["--drop_layers '2-1'", "such as 8-13,20"]),
    (["--heads", "3"], 1, ["--heads 3", "hidden size 32", "1, 2, 4"]),
    (["--hidden", "30"], 1, ["--hidden 30", "4 heads must divide", "28, 32"]),
    (["--hidden", "1.5"], 1, ["--hidden 1.5", "share between 0 and 1"]),
    (["--intermediate", "64"], 1, ["--intermediate 64", "the model has 48"]),
    (["--layers", "2", "--rows", "0"], 2, ["--rows 0"]),
    (["--layers", "2", "--device", "abacus"], 2, ["--device 'abacus'"]),
    (["--layers", "2", "--data.batch_size", "2"], 2, ["--data.batch_size without --data.train"]),
    (["--layers", "2", "--data.train", "no.jsonl"], 1, ["no.jsonl: no such file"]),
    (["--layers", "2", "--data.train", "x", "--data.trian", "y"], 2, ["--data.trian"]),
]


@pytest.mark.parametrize(("words", "status", "told"), MISTAKES, ids=lambda value: str(value)[:30])
def test_a_mistake_is_one_line(words, status, told, okd: Okd, teacher: str, here: Path) -> None:
    result = okd("shrink", "--model", teacher, "--out", "student", words)
    assert result.status == status
    (line,) = [x for x in result.err.splitlines() if x.startswith("okd-lightning: ")]
    assert all(text in line for text in told), line
    assert not (here / "student" / "config.json").exists()


def test_an_architecture_without_heads_of_their_own_width(okd: Okd, here: Path) -> None:
    from_config = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128}
    torch.manual_seed(0)
    from_gpt2(here / "gpt2", from_config)
    result = okd("shrink", "--model", "gpt2", "--hidden", "0.5", QUICK, "--out", "student")
    assert result.status == 1
    assert "okd-lightning: --hidden: gpt2 cannot be cut in this way (its LayerNorm" in result.err


def from_gpt2(folder: Path, fields: dict) -> None:
    save_model(folder, seed=1)
    config = {"model_type": "gpt2", "vocab_size": 258, "bos_token_id": 0, "eos_token_id": 1}
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    model.save_pretrained(folder)


def test_a_folder_with_files_is_left(okd: Okd, teacher: str, here: Path) -> None:
    words = ["shrink", "--model", teacher, "--drop_layers", "1", *QUICK]
    before = {path.name: path.read_bytes() for path in (here / teacher).iterdir()}
    for more in ([], ["--overwrite"]):
        result = okd(words, "--out", teacher, more)
        assert (result.status, "is loaded from" in result.err) == (1, True)
    assert {path.name: path.read_bytes() for path in (here / teacher).iterdir()} == before
    (here / "used").mkdir()
    (here / "used" / "notes.txt").write_text("mine")
    result = okd(words, "--out", "used")
    assert (result.status, "--overwrite" in result.err) == (1, True)
    result = okd(words, "--out", "used", "--overwrite")
    assert result.status == 0, result.err
    assert (here / "used" / "notes.txt").read_text() == "mine"
    assert AutoModelForCausalLM.from_pretrained("used").config.num_hidden_layers == 3


def test_an_export_does_not_replace_a_cut_student_unasked(
    okd: Okd, fit: Okd, teacher: str, here: Path
) -> None:
    assert okd("shrink", "--model", teacher, "--drop_layers", "1", QUICK, "--out", "s").status == 0
    fit("--method", "KD", "--trainer.max_steps", "1")
    export = ["export", "--ckpt_path", "run/checkpoints/last.ckpt", "--out", "s"]
    result = okd(export)
    assert (result.status, "something other than an export" in result.err) == (1, True)
    assert okd(export, "--overwrite").status == 0
    assert not (here / "s" / "shrink.json").exists()
    assert okd(export).status == 0


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "no space"), SafetensorError("no space")])
def test_a_full_disk_leaves_no_half_folder(
    error: Exception, okd: Okd, teacher: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(model: PreTrainedModel, folder: Path, **settings: object) -> None:
        (folder / "config.json").write_text("{}")
        raise error

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", fails)
    result = okd("shrink", "--model", teacher, "--drop_layers", "1", QUICK, "--out", "student")
    assert (result.status, "no space" in result.err) == (1, True)
    assert not list((here / "student").iterdir())
    assert not list(here.glob(".student*"))


def closeness(student: object, steps: int, folder: Path) -> float:
    """KL to the quickstart's teacher on held-out rows after some steps of KD."""
    torch.manual_seed(0)
    module = DistillationModule(student, str(TEACHER_DIR), learning_rate=3e-3)
    data = RolloutDataModule(
        *(str(TRAIN_FILE), str(VAL_FILE)),
        **{"batch_size": 16, "max_prompt_length": 12, "max_response_length": 16, "val_rollouts": 0},
    )
    trainer = make_trainer(folder, [KD()], max_steps=steps, limit_val_batches=2)
    trainer.fit(module, data)
    (measured,) = trainer.validate(module, data, verbose=False)
    return measured["val/forward_kl"]


@pytest.mark.filterwarnings("ignore")
def test_the_cut_start_is_ahead_of_random_weights(okd: Okd, here: Path) -> None:
    lengths = ["--data.max_prompt_length", "12", "--data.max_response_length", "16"]
    words = ["shrink", "--model", str(TEACHER_DIR), "--layers", "2", "--rows", "8"]
    result = okd(words, "--data.train", str(TRAIN_FILE), lengths, "--out", "student")
    assert result.status == 0, result.err
    config = json.loads((here / "student" / "config.json").read_text())
    random = {k: v for k, v in config.items() if k not in ("architectures", "transformers_version")}
    assert closeness("student", 12, here) < 0.8 * closeness(random, 12, here)
