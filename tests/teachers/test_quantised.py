"""Quantised teachers: bitsandbytes folders and GGUF files.

Frozen here: an NF4 folder and a Q8 GGUF file teach KD and OKD, with hidden states, and resume with
the weights of an uninterrupted run; ``diagnose --full_teacher`` says what a quantisation costs, and
0 for the model itself; a student is not trained in quantised weights. (bitsandbytes is not among
the tested packages: ``pip install --no-deps bitsandbytes`` runs its tests, on a CPU too.)
"""

from __future__ import annotations

import importlib.util
import json

import pytest
import tiny
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from quantised_models import save_nf4, write_gguf

from okd_lightning.__main__ import main
from okd_lightning.callbacks import KD, OKD, HiddenStates
from okd_lightning.errors import ModelError
from okd_lightning.models import load_tokenizer
from okd_lightning.training.module import DistillationModule

has_bitsandbytes = importlib.util.find_spec("bitsandbytes") is not None
KINDS = [
    "gguf",
    pytest.param(
        "nf4",
        marks=pytest.mark.skipif(
            not has_bitsandbytes, reason="the package bitsandbytes is not installed"
        ),
    ),
]


@pytest.fixture(scope="module")
def quantised(tmp_path_factory, tiny_tokenizer):
    """Student, full teacher and quantised teacher of one kind."""
    made: dict[str, tuple[str, str, str]] = {}

    def make(kind: str) -> tuple[str, str, str]:
        if kind in made:
            return made[kind]
        root = tmp_path_factory.mktemp(kind)
        models = {"student": tiny.make_llama(1), "full": tiny.make_llama(2)}
        for name, model in models.items():
            model.save_pretrained(root / name)
        place, tokenizer = root / "q8.gguf", tiny_tokenizer
        if kind == "gguf":  # it has a tokenizer of its own
            write_gguf(place, models["full"], True)
            tokenizer = load_tokenizer(str(place), "--model.teacher")
        else:
            place = root / "nf4"
            save_nf4(root / "full", place)
            tokenizer.save_pretrained(place)
        for name in models:
            tokenizer.save_pretrained(root / name)
        made[kind] = str(root / "student"), str(root / "full"), str(place)
        return made[kind]

    return make


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # bitsandbytes' own
@pytest.mark.parametrize("kind", KINDS)
def test_it_teaches_and_resumes(kind, quantised, tmp_path):
    student, full, place = quantised(kind)

    def fit(folder, methods, **settings):
        torch.manual_seed(5)
        module = DistillationModule(student, place, learning_rate=1e-2)
        saver = ModelCheckpoint(folder, save_last=True, every_n_train_steps=1, save_top_k=-1)
        tiny.fit(folder, module, methods, tiny.make_rows(12), callbacks=[saver], **settings)
        return module

    methods = [OKD(learning_rate=1e-2), HiddenStates({1: 1, -1: -1})]
    whole = fit(tmp_path / "whole", methods, max_steps=3)
    fit(tmp_path / "cut", methods, max_steps=1)
    last = tmp_path / "cut" / "last.ckpt"
    resumed = fit(tmp_path / "cut", methods, max_steps=3, ckpt_path=last)
    assert tiny.distance(tiny.weights(resumed), tiny.weights(whole)) == 0
    saved = torch.load(last, weights_only=True)["state_dict"]
    assert all("lora_" in name for name in saved if name.startswith("teacher."))
    own = fit(tmp_path / "kd", [KD()], max_steps=2)
    plain = DistillationModule(student, full)
    plain.configure_model()
    ids = torch.tensor([[3, 7, 11, 5]])
    with torch.no_grad():
        logits = [m.teacher(ids).logits[..., : tiny.NUM_IDS] for m in (own, plain)]
    difference = float((logits[0] - logits[1]).abs().max())
    assert 0 < difference < float(logits[1].abs().max())


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_diagnose_says_what_it_costs(kind, quantised, tmp_path, monkeypatch):
    student, full, place = quantised(kind)
    monkeypatch.chdir(tmp_path)
    rows = "".join(json.dumps(row) + "\n" for row in tiny.make_rows(24))
    (tmp_path / "rows.jsonl").write_text(rows)
    words = ["diagnose", "--model.student", student, "--model.teacher", place]
    words += ["--data.train", "rows.jsonl", "--data.max_response_length", "8", "--rows", "6"]
    words += ["--batches", "3", "--data.batch_size", "4", "--trainer.accelerator", "cpu"]
    words += ["--full_teacher"]
    costs = []
    for name, compared in (("own", place), ("full", full)):
        if name == "own" and kind == "nf4":
            costs.append(0.0)  # one comparison with itself is enough
            continue
        assert main([*words, compared, "--out", name]) == 0
        checks = json.loads((tmp_path / name / "diagnosis.json").read_text())["checks"]
        (check,) = [check for check in checks if check["name"] == "quantised teacher"]
        assert check["text"].startswith("KL(--full_teacher‖teacher) in nats per token: ")
        costs.append(float(check["text"].split("token: ")[1].split("±")[0]))
    assert costs[0] == 0.0
    assert 0.0 < costs[1] < 0.5


@pytest.mark.skipif(not has_bitsandbytes, reason="the package bitsandbytes is not installed")
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_student_is_not_trained_in_quantised_weights(quantised, tmp_path):
    _, full, place = quantised("nf4")
    module = DistillationModule(place, full)
    with pytest.raises(ModelError, match=r"weights are quantised.*LoraConfig"):
        tiny.fit(tmp_path, module, [KD()], tiny.make_rows(4))
