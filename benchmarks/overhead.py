"""Framework overhead: its KD step over a bare loop of the same loss, on ``kd_step``'s pair.

The bare loop calls both models and the fused loss itself, without Trainer, module, callback or
loader.

    python benchmarks/overhead.py [--steps 10]
"""

from __future__ import annotations

import argparse

import random_pair as pair
import torch
from side_by_side import Turns, take_turns, write_results
from torch.nn.utils import clip_grad_norm_

from okd_lightning.callbacks import KD
from okd_lightning.divergences import JensenShannon
from okd_lightning.losses import Measured, Side, WeightedTerm, fused_loss
from okd_lightning.losses.cpu_linear import fast_linears
from okd_lightning.models import LMHead, Vocabulary
from okd_lightning.models.causal_lm import head_inputs


def method() -> KD:
    """Return the method of both contenders."""
    return KD(divergence=JensenShannon(0.5))


def run_ours() -> None:
    """Train with DistillationModule and Trainer."""
    pair.train_in_turns(method())


def run_bare() -> None:
    """Train with a plain loop."""
    turns = Turns()
    student, teacher = pair.make_model("student").train(), pair.make_model("teacher").eval()
    teacher.requires_grad_(False)
    vocabulary = Vocabulary(pair.NUM_IDS)
    optimizer = torch.optim.AdamW(student.parameters(), lr=pair.LEARNING_RATE, weight_decay=0.0)
    num = pair.BATCH * (pair.LENGTH - 1)
    zeros = torch.zeros(num, dtype=torch.int64)
    about = Measured({}, zeros, zeros, torch.zeros(num))
    terms = [WeightedTerm(method().term, 1.0 / num)]
    rows = torch.nn.functional.pad(pair.make_ids(64), (0, 1), value=1)
    step = 0
    while True:
        turns.next()
        ids = rows[step % 8 * pair.BATCH :][: pair.BATCH]
        with fast_linears(student, learns=True):
            hidden = head_inputs(student, ids, None)[:, :-1].flatten(0, 1)
        with torch.no_grad(), fast_linears(teacher):
            of_teacher = head_inputs(teacher, ids, None)[:, :-1].flatten(0, 1)
        sides = (
            Side(hidden, LMHead.of(student, vocabulary)),
            Side(of_teacher, LMHead.of(teacher, vocabulary)),
        )
        targets = ids[:, 1:].flatten()
        loss = fused_loss(terms, *sides, targets, about, vocabulary.size)
        optimizer.zero_grad()
        loss.total.backward()
        clip_grad_norm_(student.parameters(), pair.CLIP_NORM)
        optimizer.step()
        step += 1


CONTENDERS = {"ours": run_ours, "bare": run_bare}


def main() -> None:
    """Measure both contenders, or run as one of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    if options.contender:
        CONTENDERS[options.contender]()
        return
    found = take_turns(__file__, {name: [name] for name in CONTENDERS}, options.steps)
    ratio = found["ours"]["median_seconds"] / found["bare"]["median_seconds"]
    write_results("overhead", {"step_over_bare_loop": round(ratio, 4), "contenders": found})


if __name__ == "__main__":
    main()
