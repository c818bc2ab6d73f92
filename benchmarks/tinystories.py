"""Measure an exported TinyStories student by a plain loop that imports nothing of the library.

Rows are bos + prompt + response + eos, cut at 128 tokens; forward KL is taken on the response. The
on-policy reverse KL is taken on the student's continuations of the first 100 prompts, cut to 16
tokens, 96 new tokens at temperature 1.

    python benchmarks/tinystories.py STUDENT TEACHER VAL.jsonl
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

EOS = 1


def divergences(student, teacher, ids: list[int], start: int) -> torch.Tensor:
    """Return sums of forward KL, reverse KL and tokens from ``start`` on."""
    batch = torch.tensor([ids])
    p = student(batch).logits[0, start - 1 : -1].log_softmax(-1)
    q = teacher(batch).logits[0, start - 1 : -1].log_softmax(-1)
    forward, reverse = (q.exp() * (q - p)).sum(), (p.exp() * (p - q)).sum()
    return torch.tensor([forward, reverse, len(ids) - start], dtype=torch.float64)


@torch.no_grad()
def main() -> None:
    """Print both numbers as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("student")
    parser.add_argument("teacher")
    parser.add_argument("val", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(options.teacher)
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(folder).eval()
        for folder in (options.student, options.teacher)
    )
    rows = [json.loads(line) for line in options.val.read_text().splitlines()]
    prompts = [tokenizer(row["prompt"]).input_ids for row in rows]
    given = torch.zeros(3, dtype=torch.float64)
    for row, prompt in zip(rows, prompts, strict=True):
        response = tokenizer(row["response"], add_special_tokens=False, verbose=False).input_ids
        given += divergences(student, teacher, (prompt + response + [EOS])[:128], len(prompt))
    torch.manual_seed(0)
    own = torch.zeros(3, dtype=torch.float64)
    for prompt in prompts[:100]:
        start = prompt[:16]
        out = student.generate(
            torch.tensor([start]), do_sample=True, top_k=0, max_new_tokens=96, pad_token_id=2
        )
        own += divergences(student, teacher, out[0].tolist(), len(start))
    print(
        json.dumps(
            {
                "forward_kl": round(float(given[0] / given[2]), 4),
                "on_policy_reverse_kl": round(float(own[1] / own[2]), 4),
            }
        )
    )


if __name__ == "__main__":
    main()
