"""Generation with a real model: the built-in engine against transformers' ``generate``.

Both generate for the same GSM8K chats with the same longest response of each prompt: 4 prompts of
24 tokens, and 64 prompts whose limits are spread evenly over 8 to 128 tokens, in batches of 8 for
``generate``, which keeps a finished row until its batch ends. They take turns in one process;
figures are CPU seconds and tokens.

    python benchmarks/real/generation.py --model FOLDER --datasets FOLDER [--turns 2]
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from okd_lightning.engines import NoiseStream, Sampling, TransformersEngine
from okd_lightning.losses.cpu_linear import onednn_layers
from okd_lightning.models import Vocabulary
from okd_lightning.records.requests import PromptBatch, Request

RESULTS = Path(__file__).parent / "results" / "generation.jsonl"
NO_EOS = 0  # an id that samples do not contain: every response has its limit's length


class Limits(StoppingCriteria):
    """Ends every row at its own length."""

    def __init__(self, width: int, limits: list[int]) -> None:
        self.ends = torch.tensor([width + limit for limit in limits])

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Return which rows are done."""
        return input_ids.shape[1] >= self.ends


def with_engine(model: PreTrainedModel, tokenizer: Any, ids: list[list[int]], limits: list[int]):
    """Generate for all prompts in one call; return the number of tokens."""
    engine = TransformersEngine(model, Vocabulary.of(tokenizer), (NO_EOS,))
    numbers = tuple(range(len(ids)))
    prompts = PromptBatch(tuple(map(tuple, ids)), numbers, (0,) * len(ids), limits=tuple(limits))
    request = Request(prompts, Sampling(), NoiseStream(0, 0), max(limits))
    return engine.respond(request).num_tokens


def with_generate(model: PreTrainedModel, ids: list[list[int]], limits: list[int], size: int):
    """Generate by batches of a size, in the order of the prompts; return the number of tokens."""
    for first in range(0, len(ids), size):
        rows, own = ids[first : first + size], limits[first : first + size]
        width = max(map(len, rows))
        model.generate(
            torch.tensor([[0] * (width - len(row)) + row for row in rows]),
            attention_mask=torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows]),
            do_sample=True,
            top_k=0,
            top_p=1.0,
            max_new_tokens=max(own),
            eos_token_id=NO_EOS,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([Limits(width, own)]),
        )
    return sum(limits)


def main() -> None:
    """Measure both sides in turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--datasets", type=Path, required=True)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--sizes", nargs="*", default=["4x24", "64xspread"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    lines = (options.datasets / "gsm8k/train.jsonl").read_text("utf-8").splitlines()[:64]
    chats = [[{"role": "user", "content": json.loads(line)["question"]}] for line in lines]
    texts = [
        tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in chats
    ]
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0)).tolist()
    spread = [8 + round(120 * place / 63) for place in order]
    cases = {"4x24": (ids[:4], [24] * 4, 4), "64xspread": (ids, spread, 8)}
    with_engine(model, tokenizer, ids[:4], [4] * 4)  # warms up
    with_generate(model, ids[:4], [4] * 4, 4)
    for name in options.sizes:
        rows, limits, size = cases[name]
        found: dict[str, list[float]] = {"engine": [], "generate": []}
        for _ in range(options.turns):
            for side, times in found.items():
                started = time.process_time()
                if side == "engine":
                    num = with_engine(model, tokenizer, rows, limits)
                else:
                    num = with_generate(model, rows, limits, size)
                times.append(round(time.process_time() - started, 2))
                print(name, side, times[-1], num, flush=True)
        line = {
            "model": options.model.name,
            "case": name,
            "onednn": onednn_layers(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "tokens": sum(limits),
            "cpu_seconds": found,
            "generate_over_engine": round(min(found["generate"]) / min(found["engine"]), 2),
            "load": round(os.getloadavg()[0], 1),
        }
        print(line)
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
