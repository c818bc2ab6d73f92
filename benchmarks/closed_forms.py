"""CPU time of one divergence and its gradient over the vocabulary, against forward KL's.

    python benchmarks/closed_forms.py [--vocab 50000 152000] [--repeats 40] [--against FOLDER]

One block of the fused loss (2^19 logits, float32, one thread): log-softmax of both sides, the
divergence, and its gradient in the student's logits. Divergences take turns; figures are medians of
CPU time. ``--against`` names a checkout of another version, such as a ``git worktree``: a process
of its own on the same core, pass by pass in turn, and the ratio to it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from okd_lightning.divergences import (
    Divergence,
    ForwardKL,
    Jeffreys,
    JensenShannon,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
)
from okd_lightning.losses import ExactDivergence, Tile

BLOCK = 2**19
KEEPS_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**30)}
"""So that no process gives buffers back to the system, which by chance costs one of them twice."""
DIVERGENCES: dict[str, Divergence] = {
    "forward KL": ForwardKL(),
    "reverse KL": ReverseKL(),
    "Jeffreys": Jeffreys(),
    "JSD(1/2)": JensenShannon(0.5),
    "JSD(0.1)": JensenShannon(0.1),
    "skew forward KL": SkewForwardKL(0.1),
    "skew reverse KL": SkewReverseKL(0.1),
}


def seconds(divergence: Divergence, student: Tensor, teacher: Tensor) -> float:
    """CPU time of one pass."""
    leaf = student.detach().requires_grad_()
    start = time.process_time()
    tile = Tile(leaf, teacher, torch.zeros(len(leaf), dtype=torch.long))
    ExactDivergence(divergence).measure(tile).sum().backward()
    return time.process_time() - start


def serve() -> None:
    """Answer every line, a vocabulary and a divergence's number, with the time of one pass."""
    torch.set_num_threads(1)
    divergences = list(DIVERGENCES.values())
    logits: dict[int, tuple[Tensor, Tensor]] = {}
    for line in sys.stdin:
        vocab, number = map(int, line.split())
        if vocab not in logits:
            generator = torch.Generator().manual_seed(0)
            student = 4 * torch.randn(BLOCK // vocab, vocab, generator=generator)
            noise = torch.randn(student.shape, generator=generator)
            logits[vocab] = student, student + noise
        print(seconds(divergences[number], *logits[vocab]), flush=True)


class Server:
    """This program with the library of a checkout, on one core with the others.

    Args:
        folder: The checkout.
    """

    def __init__(self, folder: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **KEEPS_MEMORY, "PYTHONPATH": str(folder)},
        )
        self.found: dict[tuple[int, int], list[float]] = {}

    def ask(self, vocab: int, number: int) -> None:
        """Keep the seconds of one pass."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(vocab, number, file=self.process.stdin, flush=True)
        found = self.found.setdefault((vocab, number), [])
        found.append(float(self.process.stdout.readline()))


def main() -> None:
    """Print one table a vocabulary, or answer for one that does."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocab", type=int, nargs="+", default=[50_000, 152_000])
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--against", type=Path, help="checkout of another version")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve()
        return
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    others = [options.against] if options.against else []
    servers = [Server(folder) for folder in (Path(__file__).parents[1], *others)]
    for vocab in options.vocab:
        for _ in range(options.repeats + 3):
            for number in range(len(DIVERGENCES)):
                for server in servers:
                    server.ask(vocab, number)
        print(f"\n{vocab:,} ids: milliseconds" + ", and over the other" * len(others))
        for number, name in enumerate(DIVERGENCES):
            own, *of_others = (statistics.median(s.found[vocab, number][3:]) for s in servers)
            ratios = "".join(f"  {own / other:.2f}" for other in of_others)
            print(f"{name:16} {1e3 * own:6.2f}{ratios}", flush=True)
    for server in servers:
        server.process.terminate()


if __name__ == "__main__":
    main()
