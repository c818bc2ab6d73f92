"""Loss layer on an accelerator: 8192 tokens, width 4096, 128256 ids, bf16, JSD(1/2).

Ours over several tiles and blocks, with the student's head trained and frozen, against eager torch
(in as many positions at once as fit in memory) and Liger's fused JSD where it is installed.

    python benchmarks/gpu/fused_loss.py [--tokens 8192 --width 4096 --vocab 128256] [--steps 10]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from measuring import measure, mfu, the_device, write
from torch import Tensor, nn

from okd_lightning.losses import projection

sys.path.append(str(Path(__file__).parent.parent))
from loss_layer import eager, ours

Loss = Callable[[Tensor, nn.Linear, Tensor, nn.Linear], Tensor]
TILES = [2**26, 2**27, 2**28, 2**29]
BLOCKS = [2**23, 2**25, 2**27]


def liger(student: Tensor, head: nn.Linear, teacher: Tensor, teacher_head: nn.Linear) -> Tensor:
    """Compute Liger's fused linear JSD."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss  # noqa: PLC0415

    targets = torch.zeros(len(student), dtype=torch.int64, device=student.device)
    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5)
    value: Tensor = loss(student, head.weight, teacher, teacher_head.weight, targets)
    return value


def in_parts(loss: Loss, num_parts: int) -> Loss:
    """Return ``loss`` over parts of the positions, each with its own backward pass."""

    def summed(student: Tensor, head: nn.Linear, teacher: Tensor, other: nn.Linear) -> Tensor:
        parts = zip(student.chunk(num_parts), teacher.chunk(num_parts), strict=True)
        for own, its in parts:
            (loss(own, head, its, other) / num_parts).backward(retain_graph=True)
        return student.sum() * 0

    return summed


def sweep(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return one row per contender."""
    device, width, vocab = the_device(), options.width, options.vocab
    torch.manual_seed(0)
    numbers = {"device": device, "dtype": torch.bfloat16}
    student = torch.randn(options.tokens, width, **numbers).requires_grad_()
    teacher = torch.randn(options.tokens, width, **numbers)
    head = nn.Linear(width, vocab, bias=False, **numbers)
    teacher_head = nn.Linear(width, vocab, bias=False, **numbers).requires_grad_(False)
    rows = []

    def add(name: str, loss: Loss, is_frozen: bool = False, **about: Any) -> None:
        head.requires_grad_(not is_frozen)

        def step() -> None:
            student.grad = head.weight.grad = None
            loss(student, head, teacher, teacher_head).backward()

        products = 3 if is_frozen else 4  # two logits, then dh and dW
        flops = products * 2.0 * options.tokens * width * vocab
        try:
            found: dict[str, Any] = dict(measure(step, options.steps))
            found["mfu"] = mfu(flops, found["median_ms"])
        except torch.OutOfMemoryError:
            found = {"out_of_memory": True}
        rows.append({"name": name, "frozen_head": is_frozen, **about, **found})
        print(rows[-1], flush=True)

    for tile in TILES:
        for block in BLOCKS:
            projection._TILE_ELEMENTS["accelerator"] = tile
            projection._BLOCK_ELEMENTS["accelerator"] = block
            add("ours", ours, tile_elements=tile, block_elements=block)
            if (tile, block) == (2**27, 2**25):
                add("ours", ours, is_frozen=True, tile_elements=tile, block_elements=block)
    add("eager, eight parts", in_parts(eager, 8))
    if find_spec("liger_kernel"):
        add("liger", liger)
    return rows


def main() -> None:
    """Measure all contenders in one process, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    write("fused_loss", {**vars(options), "contenders": sweep(options)})


if __name__ == "__main__":
    main()
