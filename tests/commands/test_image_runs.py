"""Commands on rows with images: frozen semantics.

* A resumed run has the weights of the run that was left alone; ``validate``, ``test`` and
  ``predict`` read images; tables and predictions show their names.
* An exported folder, full student or merged adapter, answers in transformers alone as it does here.
* ``compare`` and ``diagnose`` run.
* What reads no images is refused before models load, in one line; without the option it trains.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import vision
from cli_workbench import QUIET, assert_same_weights, read_metrics
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, LlamaConfig, LlamaForCausalLM

LIMITS = [
    *("--data.max_prompt_length", "250", "--data.max_response_length", "6"),
    *("--data.batch_size", "2", "--data.val_rollouts", "2"),
]
LORA = [
    *("--model.student_adapter", "LoraConfig", "--model.student_adapter.r", "4"),
    *("--model.student_adapter.target_modules", "[q_proj, v_proj]"),
]
LAST = "run/checkpoints/last.ckpt"


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Return a folder with a pair, a text model of their tokenizer, and data in a folder."""
    folder = tmp_path_factory.mktemp("vision")
    for name, seed in (("student", 1), ("teacher", 2)):
        vision.save("llava", folder / name, seed)
    tokenizer = vision.make_tokenizer("llava")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=len(tokenizer), num_attention_heads=4, eos_token_id=1, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder / "text")
    tokenizer.save_pretrained(folder / "text")
    vision.save("llava", folder / "other", 2)  # with another tokenizer
    tokenizer.add_tokens(["qq"])
    tokenizer.save_pretrained(folder / "other")
    (folder / "data").mkdir()
    rows = vision.image_rows(folder / "data", 8)
    (folder / "data" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture
def typed(okd, root):
    """Return a function that types a command on the pair."""

    def type_command(command, *words, student="student", teacher="teacher"):
        data = str(root / "data" / "train.jsonl")
        given = ["--model.student", str(root / student), "--data.train", data, "--data.val", data]
        if teacher is not None:
            given += ["--model.teacher", str(root / teacher)]
        return okd(command, given, LIMITS, QUIET, *words)

    return type_command


@pytest.fixture
def fit(typed):
    """Return a function that trains into ``run``, for more steps than an epoch has."""

    def type_fit(*words, folder="run", **models):
        rate = ["--model.learning_rate", "1e-2", "--trainer.max_epochs", "9"]
        place = ["--trainer.default_root_dir", folder]
        result = typed("fit", *rate, *place, *words, **models)
        assert result.status == 0, result.err
        return result

    return type_fit


def plain_answers(folder, root, num_ids):
    """Greedy responses of an exported folder, by transformers alone."""
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    masked = [vision.IMAGE_ID, *range(num_ids, model.config.get_text_config().vocab_size)]
    found = []
    for line in (root / "data" / "train.jsonl").read_text().splitlines():
        (question, _) = json.loads(line)["messages"]
        paths = [part["path"] for part in question["content"] if part["type"] == "image"]
        pictures = [Image.open(root / "data" / path).convert("RGB") for path in paths]
        for part in question["content"]:
            part.pop("path", None)
        text = processor.apply_chat_template([question], tokenize=False, add_generation_prompt=True)
        inputs = processor(
            text=[text],
            images=[pictures] if pictures else None,
            return_tensors="pt",
            add_special_tokens=False,
        )
        with torch.no_grad():
            ids = model.generate(
                **inputs, do_sample=False, max_new_tokens=6, suppress_tokens=masked
            )
        new = ids[0, inputs["input_ids"].shape[1] :]
        found.append(processor.tokenizer.decode(new, skip_special_tokens=True))
    return found


@pytest.mark.parametrize("adapter", [[], LORA], ids=["full", "adapter"])
def test_an_exported_folder_answers_the_same_in_transformers(adapter, fit, okd, root):
    fit("--method", "KD", "--trainer.max_steps", "6", *adapter)
    predicted = okd("predict", "--ckpt_path", LAST, "--data.sampling.temperature", "0")
    assert predicted.status == 0, predicted.err
    lines = Path("run/predictions.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert records[1]["prompt"] == "[image_0_1_0.png][image_0_1_1.png]what bcd"
    exported = okd("export", "--ckpt_path", LAST, "--out", "out")
    assert exported.status == 0, exported.err
    num_ids = len(vision.make_tokenizer("llava"))
    answers = plain_answers("out", root, num_ids)
    assert answers == [record["response"] for record in records]
    assert answers != plain_answers(root / "student", root, num_ids)
    assert len(set(answers)) > 3


def test_a_resumed_run_is_the_run_that_was_left_alone(fit, okd):
    method = ["--method", "GKD", "--trainer.callbacks+=SampleTable"]
    fit(*method, "--trainer.max_steps", "6", folder="whole")
    fit(*method, "--trainer.max_steps", "3")
    again = okd("fit", "--ckpt_path", LAST, "--trainer.max_steps", "6")
    assert again.status == 0, again.err
    assert_same_weights(Path(LAST), Path("whole/checkpoints/last.ckpt"))
    records = map(json.loads, Path("run/rollouts.jsonl").read_text().splitlines())
    shown = {one["prompt"] for one in records if one["kind"] == "sample"}
    assert "[image_0_1_0.png][image_0_1_1.png]what bcd" in shown
    rows = [read_metrics(Path(name) / "metrics.csv") for name in ("run", "whole")]
    losses = [[row["train/loss"] for row in own if "train/loss" in row] for own in rows]
    assert losses[0] == losses[1]
    for command in ("validate", "test"):
        said = okd(command, "--ckpt_path", LAST)
        assert said.status == 0, said.err
        assert "on_policy_reverse_kl" in said.out


def test_changed_images_are_noticed_on_resume(fit, okd, root, tmp_path):
    """The rows are the same, their files are not: weights of both would be of neither."""
    shutil.copytree(root / "data", tmp_path / "own")
    data = ["--data.train", "own/train.jsonl", "--data.val", "own/train.jsonl"]
    fit("--method", "KD", "--trainer.max_steps", "2", *data)
    for path in (tmp_path / "own").glob("*.png"):
        vision.picture(99, 9, 9).save(path)
    again = okd("fit", "--ckpt_path", LAST, "--trainer.max_steps", "4")
    assert again.status == 1
    assert "this run's prompts, images, " in again.err


def test_compare_and_diagnose_read_images(typed):
    said = typed("compare", "--methods", "SFT,OPDPlus", "--budget", "steps=2", "--out", "out")
    assert said.status == 0, said.err
    runs = json.loads(Path("out/results.json").read_text())
    assert [run["method"] for run in runs] == ["SFT", "OPDPlus"]
    assert runs[0]["before"] == runs[1]["before"]
    assert runs[0]["after"] != runs[1]["after"]
    skipped = ["--skip", "gradients,steps,trials"]
    said = typed("diagnose", *skipped, "--out", "diagnosed")
    assert said.status == 0, said.err
    assert "reverse KL" in said.out


ROLES = ("student", "teacher")
REFUSED = {
    "engine": "--model.engine VLLMServer --model.engine.url URL --model.engine.sync_folder sync",
    "cached": "--model.teacher CachedTeacher --model.teacher.folder kept",
    "served": "--model.teacher ServedTeacher --model.teacher.url URL",
    "foreign": "--model.teacher ForeignTeacher",
    "text student": "",
    "text teacher": "",
}
HINTS = {
    "engine": "VLLMServer is sent text alone: leave --model.engine out",
    "cached": "CachedTeacher reads none: give --model.teacher a folder or hub id",
    "served": "ServedTeacher reads none: give --model.teacher a folder or hub id",
    "foreign": "ForeignTeacher reads none: give --model.teacher a folder or hub id",
    "text student": "--model.student is a llama model, which reads text alone",
    "text teacher": "--model.teacher is a llama model, which reads text alone",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_reads_no_images_is_refused_in_one_line(name, typed, root):
    """The hints lead to the runs of the other tests."""
    words = REFUSED[name].replace("URL", "http://127.0.0.1:1").split()
    student, teacher = ("text" if name == f"text {role}" else role for role in ROLES)
    if name in ("cached", "foreign"):
        words += ["--model.teacher.model", str(root / ("other" if name == "foreign" else teacher))]
    own_teacher = None if "--model.teacher" in words else teacher
    method = ["--method", "KD", "--trainer.max_steps", "1"]
    said = typed("fit", *method, *words, student=student, teacher=own_teacher)
    assert said.status == 1
    (line,) = said.err.strip().splitlines()
    assert "the data has images" in line
    assert HINTS[name] in line
