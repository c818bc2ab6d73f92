"""Memory of the loss layer on Gemma 3 270M's table of 262,144 rows, by the number of loss tokens.

JSD(1/2) with the gradients of hidden states and table, float32; both sides have the table (the
student's is trained). Extra memory is the peak above the memory before the step, without the
gradients. The logits of one side, for comparison, are tokens x 262,144 x 4 bytes.

    python benchmarks/real/loss_memory.py --model FOLDER [--tokens 64 256 1024]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from loss_layer import ours

RESULTS = Path(__file__).parent / "results" / "loss_memory.json"
TABLE = "model.embed_tokens.weight"


def memory_mb(name: str) -> float:
    """Return VmRSS (now) or VmHWM (peak) of this process, in MB."""
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name + ":"))


def main() -> None:
    """Measure every number of tokens."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tokens", type=int, nargs="*", default=[64, 256, 1024])
    options = parser.parse_args()
    torch.set_num_threads(1)
    with safe_open(options.model / "model.safetensors", "pt") as file:
        table = file.get_tensor(TABLE).float()
    num_ids, width = table.shape
    head, teacher_head = (nn.Linear(width, num_ids, bias=False, device="meta") for _ in range(2))
    head.weight = nn.Parameter(table)
    teacher_head.weight = nn.Parameter(table, requires_grad=False)
    torch.manual_seed(0)
    found = []
    for tokens in (8, *options.tokens):
        student = (torch.randn(tokens, width) * 2).requires_grad_()
        teacher = torch.randn(tokens, width) * 2
        Path("/proc/self/clear_refs").write_text("5", "utf-8")  # resets the peak
        before, started = memory_mb("VmRSS"), time.process_time()
        ours(student, head, teacher, teacher_head).backward()
        seconds = time.process_time() - started
        gradients = (table.numel() + student.numel()) * 4 / 2**20
        head.weight.grad = None
        found.append(
            {
                "tokens": tokens,
                "extra_mb": round(memory_mb("VmHWM") - before - gradients),
                "logits_of_one_side_mb": round(tokens * num_ids * 4 / 2**20),
                "cpu_seconds": round(seconds, 2),
            }
        )
        print(found[-1], flush=True)
    RESULTS.write_text(
        json.dumps({"table": list(table.shape), "sizes": found[1:]}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
