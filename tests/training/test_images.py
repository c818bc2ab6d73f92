"""Vision-language pairs: frozen semantics.

* Loss and gradient of KD and SFT equal those of plain transformers calls, row by row, for six
  families; ids of image places are masked on both sides.
* They do not depend on the number of micro-batches; a killed run resumes bit for bit; exchanging
  the images of two rows changes the loss.
* The vision tower is frozen unless ``freeze_vision`` is off; its projector is trained.
* A teacher with another processor reads its own number of image tokens.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import vision
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import fit, weights

from okd_lightning.callbacks import KD, SFT
from okd_lightning.data.columns import Columns
from okd_lightning.data.examples import build_examples
from okd_lightning.data.images import RowImages
from okd_lightning.divergences import ForwardKL
from okd_lightning.losses.quantities import DrawnLogProb, ExactDivergence
from okd_lightning.records.collation import collate, dataset_row
from okd_lightning.training.module import DistillationModule
from okd_lightning.training.safeguards.idle_options import RULES

FAMILIES = ("idefics3", "llava", "gemma3", "smolvlm", "qwen2_vl", "qwen2_5_vl")
KL = ExactDivergence(ForwardKL())
LOGPROB = DrawnLogProb("student")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Return a folder with data."""
    folder = tmp_path_factory.mktemp("vision")
    rows = vision.image_rows(folder, 8)
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(scope="module")
def pair_of(root):
    """Return a function: family → folders of a student and a teacher."""
    made: dict[str, tuple[str, str]] = {}

    def pair(family: str) -> tuple[str, str]:
        if family not in made:
            size = 32 if family in ("idefics3", "smolvlm") else 16
            made[family] = tuple(
                vision.save(family, root / f"{family}_{seed}", seed, size) for seed in (1, 2)
            )
        return made[family]

    return pair


def read(module, folder, rows, **settings):
    """Tokenize rows as the data module does."""
    images = module.pair.images
    module.pair.use_images()
    limits = {"max_prompt_length": 250, "max_response_length": 16, "on_overlong": "error"}
    return build_examples(
        rows,
        module.tokenizer,
        eos_id=1,
        columns=Columns(),
        needs_response=True,
        where="rows",
        images=RowImages(images.student, images.teacher, folder),
        **{**limits, **settings},
    ).examples


def plain_logprobs(model, module, example, folder, row, images=None):
    """[response, vocab] log-probabilities from the processor's own call and a plain forward."""
    reader = images or module.pair.images.student
    messages = [
        {
            **message,
            "content": [
                {"type": "image"} if part["type"] == "image" else part
                for part in message["content"]
            ],
        }
        for message in row["messages"][:1]
    ]
    text = reader.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    parts = row["messages"][0]["content"]
    pictures = [
        vision.Image.open(folder / part["path"]).convert("RGB")
        for part in parts
        if part["type"] == "image"
    ]
    given = reader.processor(
        text=[text],
        images=[pictures] if pictures else None,
        return_tensors="pt",
        add_special_tokens=False,
    )
    response = torch.tensor([example.response_ids])
    ids = torch.cat([given["input_ids"], response], 1)
    given["input_ids"], given["attention_mask"] = ids, torch.ones_like(ids)
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in given:
            given[name] = torch.cat([given[name], torch.zeros_like(response)], 1)
    logits = model(**given).logits[0, -response.shape[1] - 1 : -1, : module.vocabulary.size]
    masked = torch.zeros(module.vocabulary.size, dtype=torch.bool)
    masked[sorted(module.pair.images.mask_ids)] = True
    return logits.masked_fill(masked, -torch.inf).log_softmax(-1)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradient_equal_plain_transformers(family, root, pair_of):
    module = DistillationModule(*pair_of(family))
    rows = [json.loads(line) for line in (root / "train.jsonl").read_text().splitlines()][:5]
    examples = read(module, root, rows)
    assert [len(example.images) for example in examples] == [1, 2, 0, 1, 2]
    module.configure_model()
    module.eval()
    student, teacher = module.student, module.teacher
    measured = module.measure(collate([dataset_row(e) for e in examples]), (KL, LOGPROB))
    (measured[KL].sum() - measured[LOGPROB].sum()).backward()
    trained = {n: p for n, p in student.named_parameters() if p.requires_grad}
    found = {name: p.grad.clone() for name, p in trained.items() if p.grad is not None}
    student.zero_grad()
    total = torch.zeros(())
    for number, (example, row) in enumerate(zip(examples, rows, strict=True)):
        p = plain_logprobs(student, module, example, root, row)
        with torch.no_grad():
            q = plain_logprobs(teacher, module, example, root, row)
        kl = torch.where(q > -torch.inf, q.exp() * (q - p), 0.0).sum(-1)
        drawn = p.gather(1, torch.tensor(example.response_ids)[:, None])[:, 0]
        total = total + kl.sum() - drawn.sum()
        here = measured.row == number
        torch.testing.assert_close(measured[KL][here], kl, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(measured[LOGPROB][here], drawn, atol=1e-5, rtol=1e-5)
    total.backward()
    assert found.keys() == {n for n, p in trained.items() if p.grad is not None}
    for name, gradient in found.items():
        expected = trained[name].grad
        assert float((gradient - expected).norm()) <= 1e-5 * float(expected.norm()) + 1e-6, name


@pytest.mark.parametrize("freezes", [True, False])
def test_vision_tower_is_trained_on_request_alone(freezes, pair_of):
    module = DistillationModule(*pair_of("idefics3"), freeze_vision=freezes)
    module.configure_model()
    trained = {n for n, p in module.student.named_parameters() if p.requires_grad}
    assert any("connector" in name for name in trained)
    assert any("vision_model" in name for name in trained) == (not freezes)
    run = SimpleNamespace(module=module)
    assert RULES["model.freeze_vision"](run) is None
    assert RULES["data.images_column"](run) is None


DATA = {"max_prompt_length": 250, "batch_size": 8}


def run(root, pair, methods=None, data=None, **settings):
    module = DistillationModule(*pair, learning_rate=1e-2, dtype="float64")
    given = {**DATA, **(data or {})}
    methods = methods or [KD(), SFT(weight=0.5)]
    recorder = fit(root, module, methods, str(root / "train.jsonl"), data=given, **settings)
    return module, recorder


def test_gradient_does_not_depend_on_micro_batches(root, pair_of):
    runs = [
        run(root, pair_of("idefics3"), data={"batch_size": 8 // n, "global_batch_size": 8})[1]
        for n in (1, 2, 4)
    ]
    assert [len(recorder.steps[0]) for recorder in runs] == [1, 2, 4]
    first = runs[0].gradients[0]
    for other in runs[1:]:
        for name, gradient in other.gradients[0].items():
            torch.testing.assert_close(gradient, first[name], atol=1e-12, rtol=1e-9)


def test_resumed_run_has_the_same_weights(root, pair_of, tmp_path):
    settings = {"data": {"batch_size": 4}, "max_epochs": 2}
    whole, _ = run(root, pair_of("llava"), **settings)
    savers = [
        ModelCheckpoint(dirpath=tmp_path / name, every_n_train_steps=1, save_top_k=-1)
        for name in ("first", "second")
    ]
    run(root, pair_of("llava"), callbacks=savers[:1], **settings)
    paths = sorted((tmp_path / "first").glob("*.ckpt"))
    assert len(paths) == 4
    content = paths[0].read_bytes()
    assert b"pixel_values" not in content
    again = {"callbacks": savers[1:], "ckpt_path": paths[1]}
    resumed, _ = run(root, pair_of("llava"), **again, **settings)
    expected = weights(whole)
    for name, parameter in weights(resumed).items():
        assert torch.equal(parameter, expected[name]), name


def test_exchanged_images_change_the_loss(root, pair_of):
    module = DistillationModule(*pair_of("llava"))
    rows = [json.loads(line) for line in (root / "train.jsonl").read_text().splitlines()]
    examples = [e for e in read(module, root, rows) if len(e.images) == 1]
    module.configure_model()
    batch = collate([dataset_row(example) for example in examples])
    values = []
    for images in (batch.images, batch.images[::-1]):
        changed = replace(batch, images=images, teacher_images=images)
        values.append(module.measure(changed, (KL,))[KL])
    assert not torch.allclose(values[0], values[1], atol=1e-3)


def test_teacher_with_another_processor_reads_its_own_image_tokens(root, pair_of):
    student, _ = pair_of("idefics3")
    teacher = vision.save("idefics3", root / "wide", 5, size=16)
    module = DistillationModule(student, teacher)
    rows = [json.loads(line) for line in (root / "train.jsonl").read_text().splitlines()][:3]
    examples = read(module, root, rows)
    reader = module.pair.images.teacher
    assert reader is not None
    assert len(examples[0].teacher_prompt_ids) < len(examples[0].prompt_ids)
    assert not examples[2].teacher_prompt_ids  # it has no image
    module.configure_model()
    module.eval()
    with torch.no_grad():
        measured = module.measure(collate([dataset_row(e) for e in examples]), (KL,))
        for number, (example, row) in enumerate(zip(examples, rows, strict=True)):
            p = plain_logprobs(module.student, module, example, root, row)
            q = plain_logprobs(module.teacher, module, example, root, row, images=reader)
            kl = torch.where(q > -torch.inf, q.exp() * (q - p), 0.0).sum(-1)
            here = measured.row == number
            torch.testing.assert_close(measured[KL][here], kl, atol=1e-5, rtol=1e-5)
