"""A student learns the texts of a teacher with another tokenizer.

Frozen here: on held-out texts that the teacher sampled, the student's nats per byte fall by each
loss over texts, without cross-entropy and with it. The teacher's own probability of a text does not
change, so this is the fall of the forward KL in nats per byte.
"""

from __future__ import annotations

import pytest
import tiny
import torch
from foreign_pairs import make, train
from transformers import AutoModelForCausalLM, AutoTokenizer

from okd_lightning.callbacks import KD
from okd_lightning.teachers import ForeignTeacher

NUM_TEXTS, NUM_HELD_OUT, LONGEST = 96, 32, 8


@pytest.fixture(scope="module")
def texts(root) -> list[dict[str, str]]:
    """Prompts of one letter, and the teacher's responses to them, without control ids."""
    model = AutoModelForCausalLM.from_pretrained(root / "pairs").eval()
    with torch.no_grad():  # a teacher that is sure of what it writes can be learned from few rows
        model.lm_head.weight *= 4
    model.save_pretrained(root / "sure")
    tokenizer = AutoTokenizer.from_pretrained(root / "pairs")
    tokenizer.save_pretrained(root / "sure")
    prompts = [tiny.LETTERS[i % len(tiny.LETTERS)] for i in range(NUM_TEXTS + NUM_HELD_OUT)]
    ids = torch.tensor([tokenizer(prompt).input_ids for prompt in prompts])
    torch.manual_seed(0)
    found = model.generate(ids, do_sample=True, max_new_tokens=LONGEST, suppress_tokens=[0, 2])
    rows = []
    for prompt, row in zip(prompts, found[:, ids.shape[1] :], strict=True):
        text = "".join(tokenizer.convert_ids_to_tokens(row[row > 2].tolist()))
        rows.append({"prompt": prompt, "response": text or prompt})
    return rows


def nats_per_byte(module, rows) -> float:
    """The student's cross-entropy of whole texts, over their bytes."""
    total = count = 0
    for row in rows:
        prompt, ids = (module.tokenizer(row[name]).input_ids for name in ("prompt", "response"))
        with torch.no_grad():
            logits = module.student(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
        total -= float(logits[:, : tiny.NUM_IDS].log_softmax(-1)[range(len(ids)), ids].sum())
        count += len(row["response"].encode())
    return total / count


@pytest.mark.parametrize(
    ("method", "loss"),
    [
        (KD, "chunk"),
        (KD, "text"),
        (KD, "next_byte"),
        (lambda: KD(cross_entropy_weight=0.5), "text"),
    ],
)
def test_nats_per_byte_fall_on_texts_of_the_teacher(method, loss, texts, root, tmp_path):
    teacher = ForeignTeacher(str(root / "sure"), loss=loss)
    module = make(root, teacher, learning_rate=3e-3)
    module.configure_model()
    given, held_out = texts[:NUM_TEXTS], texts[NUM_TEXTS:]
    before = nats_per_byte(module, held_out)
    data = {"batch_size": 16, "max_response_length": 16}
    train(tmp_path, module, [method()], given, max_steps=40, data=data)
    assert nats_per_byte(module, held_out) < before - 0.1
