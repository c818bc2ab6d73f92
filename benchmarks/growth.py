"""Growth of costs with tokens per step, with the vocabulary, and with prompts per epoch.

The first two are KD steps with JSD(1/2) on random Llamas (three layers, heads untied). The third is
the loader alone, on prompts of 16 tokens with responses of 16: set-up, the first batch of an epoch,
a batch, and its state for a checkpoint.

    python benchmarks/growth.py [--steps 3]
"""

from __future__ import annotations

import argparse
import time
from typing import Any, cast

import torch
from side_by_side import Turns, peak_mb, take_turns, write_results
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from okd_lightning.callbacks import KD
from okd_lightning.divergences import JensenShannon
from okd_lightning.engines import RolloutEngine, Sampling
from okd_lightning.losses import Measured, Side, WeightedTerm, fused_loss
from okd_lightning.models import LMHead, Vocabulary, hidden_at_loss
from okd_lightning.records.batches import Example, TrainingRow
from okd_lightning.records.collation import collate
from okd_lightning.rollouts import LoaderShape, RolloutLoader
from okd_lightning.rollouts.plan_of_terms import plan_for

LENGTH = 256
TOKENS = [(rows, 32000) for rows in (2, 4, 8, 16, 32)]
VOCABULARIES = [(4, vocab) for vocab in (8000, 32000, 128000)]
PROMPTS = [1_000, 10_000, 100_000]


def make_model(width: int, vocab: int, seed: int) -> PreTrainedModel:
    """Make a random Llama of three layers."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=3,
            num_attention_heads=width // 64,
            tie_word_embeddings=False,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=2,
        )
    )


def run_steps(rows: int, vocab: int) -> None:
    """Run forward and backward of a KD step, one per turn."""
    turns = Turns()
    student, teacher = make_model(256, vocab, 0), make_model(512, vocab, 1)
    teacher.requires_grad_(False).eval()
    vocabulary = Vocabulary(vocab)
    ids = torch.randint(3, vocab, (rows, LENGTH)).tolist()
    loss = (False,) + (True,) * (LENGTH - 1)
    batch = collate([TrainingRow(i, "dataset", tuple(row), loss, 1) for i, row in enumerate(ids)])
    terms = [WeightedTerm(KD(divergence=JensenShannon(0.5)).term, 1.0 / (rows * LENGTH))]
    read = batch.student_reads
    while True:
        turns.next()
        hidden = hidden_at_loss(student, read, packs=True)
        with torch.no_grad():
            of_teacher = hidden_at_loss(teacher, read, packs=True)
        sides = (
            Side(hidden, LMHead.of(student, vocabulary)),
            Side(of_teacher, LMHead.of(teacher, vocabulary)),
        )
        fused_loss(terms, *sides, read.targets, Measured.about(batch), vocab).total.backward()
        student.zero_grad()


def loader_costs(num_prompts: int) -> dict[str, Any]:
    """Return the seconds of each operation of the loader, in an epoch over all prompts."""
    ids = torch.randint(3, 32000, (num_prompts, 32)).tolist()
    examples = [
        Example(i, tuple(row[:16]), (False,) * 16, tuple(row[16:]), "", "")
        for i, row in enumerate(ids)
    ]
    before = peak_mb()
    start = time.perf_counter()
    loader = RolloutLoader(
        examples,
        plan_for([KD()]),
        LoaderShape(batch_size=8, prompts_per_epoch=num_prompts),
        cast(RolloutEngine, None),  # all responses are the dataset's
        sampling=Sampling(),
        max_new_tokens=16,
        seed=0,
    )
    batches = iter(loader)
    made = time.perf_counter()
    next(batches)
    first = time.perf_counter()
    for _ in range(100):
        next(batches)
    hundred = time.perf_counter()
    for _ in range(3):
        loader.state_dict()
    saved = time.perf_counter()
    return {
        "prompts": num_prompts,
        "set_up_seconds": round(made - start, 4),
        "first_batch_seconds": round(first - made, 4),
        "batch_seconds": round((hundred - first) / 100, 6),
        "checkpoint_seconds": round((saved - hundred) / 3, 4),
        "grown_mb": round(peak_mb() - before, 1),
    }


def step_costs(rows: int, vocab: int, steps: int) -> dict[str, Any]:
    """Return the medians of one size, also per logit."""
    size = ["step", "--rows", str(rows), "--vocab", str(vocab)]
    found = take_turns(__file__, {"ours": size}, steps)["ours"]
    logits = rows * (LENGTH - 1) * vocab
    return {
        "tokens": rows * LENGTH,
        "vocab": vocab,
        "nanoseconds_of_cpu_a_logit": round(found["median_cpu_seconds"] / logits * 1e9, 3),
        **found,
    }


def main() -> None:
    """Measure all parts, or run as one step's process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contender", choices=["step"], help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--vocab", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args()
    if options.contender:
        run_steps(options.rows, options.vocab)
        return
    results = {
        "tokens": [step_costs(*size, options.steps) for size in TOKENS],
        "vocabulary": [step_costs(*size, options.steps) for size in VOCABULARIES],
        "prompts": [loader_costs(num) for num in PROMPTS],
    }
    write_results("growth", results)


if __name__ == "__main__":
    main()
