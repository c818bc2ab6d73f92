"""A student, teachers with its tokenizer and others, and runs of them."""

from __future__ import annotations

import tiny
import torch
from pair_tokenizers import merging

from okd_lightning.teachers import ForeignTeacher
from okd_lightning.training.module import DistillationModule

ROWS = tiny.make_rows(16)
NUM = tiny.NUM_IDS
ALL = {"batch_size": 8, "max_response_length": 6}


def read_rows(lines):
    return [dict(zip(("prompt", "response"), line.split(","), strict=True)) for line in lines]


def permuted(model, tokenizer, other):
    """The model with its letters at another tokenizer's ids."""
    ids = [
        tokenizer.get_vocab()[token]
        for token in sorted(other.get_vocab(), key=other.get_vocab().get)
    ]
    made = tiny.make_llama(0, NUM)
    made.load_state_dict(model.state_dict())
    with torch.no_grad():
        for table in (made.get_input_embeddings(), made.get_output_embeddings()):
            table.weight.copy_(table.weight[ids])
    return made


def save_folders(root):
    """Save folders of a student, a teacher, that teacher with other ids, and one with pairs."""
    own, other = tiny.make_tokenizer(), tiny.make_tokenizer(tiny.LETTERS[::-1])
    teacher = tiny.make_llama(2, NUM)
    pairs = merging("ab", "cd", "ef")
    for name, model, tokenizer in (
        ("student", tiny.make_llama(1), own),
        ("teacher", teacher, own),
        ("other", permuted(teacher, own, other), other),
        ("pairs", tiny.make_llama(3, len(pairs)), pairs),
    ):
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)


def make(root, teacher, **settings) -> DistillationModule:
    torch.manual_seed(3)
    sgd = {"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.05)}
    return DistillationModule(str(root / "student"), teacher, dtype="float64", **sgd, **settings)


def foreign(root, name="pairs", **settings) -> DistillationModule:
    return make(root, ForeignTeacher(str(root / name), loss="chunk"), **settings)


def train(where, module, methods, rows=ROWS, **settings):
    return tiny.fit(where, module, methods, rows, **{"max_steps": 3, **settings})
