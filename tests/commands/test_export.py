"""Frozen here: an exported folder is an ordinary Hugging Face model, and ours again.

* it loads with transformers (and PEFT) alone and gives the logits that training ended with;
* it carries tokenizer, generation config and a card with method, data and measured numbers;
* the student's own generation settings stay, also where transformers refuses to save them; end and
  pad ids are the run's; ``--dtype`` is the format of the written weights;
* its generation config lists every end id of the run, its config keeps the student's own;
* it serves as student and as teacher of the next run.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli_workbench import STUDENT_FIELDS, Assets, Result, read_checkpoint_weights
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

Fit = Callable[..., Result]
LAST = "run/checkpoints/last.ckpt"
LORA = ["--model.student_adapter", "LoraConfig", "--model.student_adapter.r", "4"]
FAST = ["--model.learning_rate", "1e-2"]
IDS = torch.tensor([[70, 71, 72, 73, 74]])


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(IDS).logits


@pytest.fixture
def base(assets: Assets) -> torch.nn.Module:
    """The student before training."""
    return AutoModelForCausalLM.from_pretrained(assets.student)


def test_a_full_student(fit: Fit, okd: Fit, base: torch.nn.Module) -> None:
    fit("--method", "KD", "--method.temperature", "2", *FAST)
    result = okd("export", "--ckpt_path", LAST, "--out", "out")
    assert (result.status, result.out) == (0, "student written to out\n")
    weights = read_checkpoint_weights(Path(LAST))
    before = logits(base)
    base.load_state_dict({n.removeprefix("student."): v for n, v in weights.items()})
    exported = AutoModelForCausalLM.from_pretrained("out")
    assert torch.equal(logits(exported), logits(base))
    assert not torch.allclose(logits(exported), before)
    assert AutoTokenizer.from_pretrained("out")("abc").input_ids
    assert exported.generation_config.eos_token_id in (1, [1])
    assert exported.generation_config.pad_token_id is not None


@pytest.mark.parametrize("lora", [False, True])
def test_own_generation_settings_stay_and_weights_are_written_in_a_format(
    fit: Fit, okd: Fit, assets: Assets, lora: bool
) -> None:
    own = Path("own")
    shutil.copytree(assets.student, own)
    settings = {"temperature": 0.7, "repetition_penalty": 1.25, "eos_token_id": 1}
    (own / "generation_config.json").write_text(json.dumps(settings))
    models = ["--model.student", str(own), "--model.teacher", assets.teacher]
    fit("--method", "KD", *models, *(LORA if lora else ()), models=False)
    result = okd("export", "--ckpt_path", LAST, "--out", "out", "--dtype", "bfloat16")
    assert result.status == 0
    written = json.loads(Path("out/generation_config.json").read_text())
    assert (written["temperature"], written["repetition_penalty"]) == (0.7, 1.25)
    assert "do_sample" not in written
    assert written["pad_token_id"] is not None
    exported = AutoModelForCausalLM.from_pretrained("out", dtype="auto")
    assert exported.generation_config.temperature == 0.7
    assert {p.dtype for p in exported.parameters()} == {torch.bfloat16}
    assert okd("export", "--ckpt_path", LAST, "--out", "full").status == 0
    full = AutoModelForCausalLM.from_pretrained("full", dtype="auto").state_dict()
    for name, values in exported.state_dict().items():
        assert full[name].dtype == torch.float32
        assert torch.equal(values, full[name].bfloat16())


def test_the_generation_config_lists_every_end_id(fit: Fit, okd: Fit, assets: Assets) -> None:
    fit("--method", "KD", "--model.end_tokens", "[1, 2]")
    okd("export", "--ckpt_path", LAST, "--out", "out")
    exported = AutoModelForCausalLM.from_pretrained("out")
    assert exported.generation_config.eos_token_id == [1, 2]
    own = AutoModelForCausalLM.from_pretrained(assets.student).config.eos_token_id
    assert exported.config.eos_token_id == own == 1
    with torch.no_grad():  # transformers alone stops at the second one
        head = exported.get_output_embeddings()
        head.weight.zero_()
        head.bias = torch.nn.Parameter(torch.zeros(len(head.weight)))
        head.bias[2] = 9.0
    assert exported.generate(IDS, max_new_tokens=5).tolist() == [[*IDS[0].tolist(), 2]]


def test_the_card_says_where_it_comes_from(fit: Fit, okd: Fit, assets: Assets) -> None:
    fit("--method", "KD", "--method.temperature", "2")
    okd("export", "--ckpt_path", LAST, "--out", "out")
    card = Path("out/README.md").read_text()
    for words in ("KD", "temperature: 2.0", assets.train, assets.teacher, "6 optimizer steps"):
        assert words in card
    assert "val/reverse_kl" in card


def test_the_card_shows_methods_among_the_callbacks(fit: Fit, okd: Fit) -> None:
    fit("--trainer.callbacks+=KD", "--trainer.callbacks.temperature", "2.5")
    okd("export", "--ckpt_path", LAST, "--out", "out")
    card = Path("out/README.md").read_text().partition("## Method")[2].partition("```")[2]
    assert "KD" in card
    assert "temperature: 2.5" in card.partition("```")[0]


def test_an_exported_student_learns_and_teaches_again(fit: Fit, okd: Fit, assets: Assets) -> None:
    fit("--method", "KD")
    okd("export", "--ckpt_path", LAST, "--out", "out")
    fit("--method", "KD", "--model.student", "out", "--model.teacher", assets.teacher, models=False)
    fit("--method", "KD", "--model.student", assets.student, "--model.teacher", "out", models=False)


@pytest.mark.parametrize("source", ["folder", "config"])
def test_lora_merged_and_apart_agree(
    fit: Fit, okd: Fit, assets: Assets, base: torch.nn.Module, source: str
) -> None:
    student = ["--model.student", str({"model_type": "llama", **STUDENT_FIELDS})]
    rest = ["--model.tokenizer", assets.tokenizer, "--model.teacher", assets.teacher]
    models = assets.models if source == "folder" else [*student, *rest]
    fit("--method", "KD", *LORA, *FAST, *models, models=False)
    assert okd("export", "--ckpt_path", LAST, "--out", "merged").status == 0
    merged = AutoModelForCausalLM.from_pretrained("merged")
    assert not any("lora" in name for name in merged.state_dict())
    assert okd("export", "--ckpt_path", LAST, "--out", "apart", "--adapter", "apart").status == 0
    if source == "folder":
        before = logits(base)
        apart = PeftModel.from_pretrained(base, "apart")
        torch.testing.assert_close(logits(apart), logits(merged))
        assert not torch.allclose(before, logits(merged), atol=1e-4)


def test_a_student_from_random_weights(fit: Fit, okd: Fit, assets: Assets) -> None:
    fit(
        *("--method", "KD", "--model.student", str({"model_type": "llama", **STUDENT_FIELDS})),
        *("--model.teacher", assets.teacher),
        models=False,
    )
    assert okd("export", "--ckpt_path", LAST, "--out", "out").status == 0
    weights = read_checkpoint_weights(Path(LAST))
    exported = AutoModelForCausalLM.from_pretrained("out").state_dict()
    assert torch.equal(exported["lm_head.weight"], weights["student.lm_head.weight"])


def test_exporting_into_a_used_folder_replaces_the_model(fit: Fit, okd: Fit) -> None:
    """No file of an earlier export, in any form, is read instead of the new one."""
    fit("--method", "KD", *LORA, *FAST)
    assert okd("export", "--ckpt_path", LAST, "--out", "merged").status == 0
    for _ in range(2):
        for form in ("apart", "merged"):
            result = okd("export", "--ckpt_path", LAST, "--out", "out", "--adapter", form)
            assert result.status == 0, result.err
            names = {path.name for path in Path("out").iterdir()}
            assert ("adapter_config.json" in names) == (form == "apart")
            assert ("model.safetensors" in names) == (form == "merged")
    found = [AutoModelForCausalLM.from_pretrained(name) for name in ("out", "merged")]
    assert torch.equal(*map(logits, found))


def test_an_export_that_fails_leaves_the_one_before(
    fit: Fit, okd: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit("--method", "KD")
    assert okd("export", "--ckpt_path", LAST, "--out", "out").status == 0
    before = {path.name: path.read_bytes() for path in Path("out").iterdir()}

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", full)
    result = okd("export", "--ckpt_path", LAST, "--out", "out")
    assert result.status == 1
    assert "No space left" in result.err.splitlines()[-1]
    assert {path.name: path.read_bytes() for path in Path("out").iterdir()} == before


def test_an_export_does_not_replace_a_model_that_the_run_needs(
    fit: Fit, okd: Fit, assets: Assets
) -> None:
    fit("--method", "KD")
    before = {path: path.read_bytes() for path in Path(assets.student).iterdir()}
    result = okd("export", "--ckpt_path", LAST, "--out", assets.student)
    assert result.status == 1
    assert "is the folder that --model.student is loaded from; choose another one" in result.err
    assert {path: path.read_bytes() for path in Path(assets.student).iterdir()} == before


OKD = ["--method", "OKD", "--method.online_module", "LoraConfig", "--method.online_module.r", "4"]


def test_an_online_module(fit: Fit, okd: Fit, assets: Assets) -> None:
    fit(*OKD, "--method.alpha", "0.9", "--method.learning_rate", "0.1", *FAST)
    result = okd("export", "--what", "online_module", "--ckpt_path", LAST, "--out", "module")
    assert (result.status, result.out) == (0, "online_module written to module\n")
    teacher = AutoModelForCausalLM.from_pretrained(assets.teacher)
    before = logits(teacher)
    adapted = PeftModel.from_pretrained(teacher, "module")
    after = logits(adapted)
    assert not torch.allclose(after, before, atol=1e-3)
    weights = torch.load(LAST, weights_only=True)["state_dict"]
    saved = {name: value for name, value in weights.items() if name.startswith("teacher.")}
    assert saved
    assert all("lora_" in name for name in saved)
    found = {n: p for n, p in adapted.named_parameters() if "lora_" in n}
    for name, value in saved.items():
        (match,) = [p for n, p in found.items() if n.endswith(name.removeprefix("teacher."))]
        assert torch.equal(match, value)


def unlike_a_quantised_base(self: nn.Module, *arguments: object, **settings: object) -> nn.Module:
    """transformers' refusal for a quantised model; ours has no weights in 4 bits on CPUs."""
    if "dtype" in settings:
        raise ValueError("You cannot cast a quantised model in a new `dtype`")
    return nn.Module.to(self, *arguments, **settings)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("part", ["online_module", "student"])
def test_the_number_format_of_an_adapter(
    part: str,
    dtype: str,
    fit: Fit,
    okd: Fit,
    assets: Assets,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Only the adapter is converted: its base is not in the folder, and may be quantised."""
    fit(*(["--method", "KD", *LORA] if part == "student" else OKD), *FAST)
    typed = ["--what", part, "--ckpt_path", LAST, "--adapter", "apart"]
    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedModel, "to", unlike_a_quantised_base)
        for out, more in (("full", []), ("small", ["--dtype", dtype])):
            result = okd("export", *typed, "--out", out, *more)
            assert result.status == 0, result.err
    full, small = (load_file(f"{name}/adapter_model.safetensors") for name in ("full", "small"))
    assert full.keys() == small.keys()
    for name, value in small.items():
        assert full[name].dtype == torch.float32
        assert torch.equal(value, full[name].to(getattr(torch, dtype)))
    base = assets.student if part == "student" else assets.teacher
    models = [AutoModelForCausalLM.from_pretrained(base) for _ in range(2)]
    pair = [PeftModel.from_pretrained(m, n) for m, n in zip(models, ("full", "small"), strict=True)]
    torch.testing.assert_close(logits(pair[0]), logits(pair[1]), rtol=0.02, atol=0.02)


@pytest.mark.filterwarnings("ignore:.*OKD's settings .* are dropped")
def test_an_online_module_teaches_again(fit: Fit, okd: Fit) -> None:
    fit(*OKD, "--method.alpha", "0.9", "--method.learning_rate", "0.1", *FAST)
    okd("export", "--what", "online_module", "--ckpt_path", LAST, "--out", "module")
    numbers = okd("validate", "--ckpt_path", LAST).out
    again = okd("validate", "--ckpt_path", LAST, "--model.teacher", "module", "--method", "KD")
    assert again.status == 0, again.err
    adapted = next(line for line in numbers.splitlines() if "val/adapted_forward_kl" in line)
    plain = next(line for line in again.out.splitlines() if "val/forward_kl" in line)
    assert float(plain.split()[1]) == pytest.approx(float(adapted.split()[1]), rel=1e-4)


def test_no_online_module_to_export(fit: Fit, okd: Fit) -> None:
    fit("--method", "KD")
    result = okd("export", "--what", "online_module", "--ckpt_path", LAST, "--out", "module")
    assert result.status == 1
    assert "holds no online module" in result.err
    assert not Path("module").exists()
