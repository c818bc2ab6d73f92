"""Float32 error of gradients for nearly equal student and teacher, before and after centring.

    python benchmarks/near_equality.py [--vocab 1000 50000 152000 262144] [--rows 3] [--output FILE]

Logits are 4 z with z normal; the teacher's differ by delta z'. Errors are those of the gradient in
the logits against float64, relative to the norm of the true gradient; at delta 0 (identical
logits), where the true gradient is 0, the norm itself. *Uncentred* are the weights w_f without
centring: two numbers of size p cancel, and the rounding of log_softmax is left. *TRL* is autograd
through the loss of its GKDTrainer, where that has the divergence. The last table is the effect of
the rounding under AdamW: the largest change of any logit in 200 steps at rate 1e-3, for a student
that starts equal to its teacher.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from trl.experimental.gkd import GKDTrainer

from okd_lightning.divergences import (
    Divergence,
    ForwardKL,
    JensenShannon,
    LogProbPair,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    Summands,
    Tempered,
    TopK,
)
from okd_lightning.losses import ExactDivergence, ModelRole, Tile

Gradient = Callable[[Tensor, Tensor], Tensor]

DELTAS = (0.0, 1e-3, 1e-2, 1e-1)

CASES: dict[str, tuple[Divergence, ModelRole]] = {
    "forward KL": (ForwardKL(), "student"),
    "reverse KL": (ReverseKL(), "student"),
    "JSD(1/2)": (JensenShannon(0.5), "student"),
    "skew forward KL": (SkewForwardKL(0.1), "student"),
    "skew reverse KL": (SkewReverseKL(0.1), "student"),
    "forward KL, temperature 2": (Tempered(ForwardKL(), 2.0), "student"),
    "forward KL, top 64": (TopK(ForwardKL(), 64), "student"),
    "forward KL, teacher learns": (ForwardKL(), "teacher"),
    "reverse KL, teacher learns": (ReverseKL(), "teacher"),
}

TRL_BETAS = {"forward KL": 0.0, "reverse KL": 1.0, "JSD(1/2)": 0.5}


@dataclass(frozen=True)
class Uncentred(Divergence):
    """A divergence with uncentred summands: p w_f, and q f' likewise."""

    divergence: Divergence

    def generator(self, log_ratio: Tensor) -> Tensor:
        """Return the inner divergence's f."""
        return self.divergence.generator(log_ratio)

    def weight(self, log_ratio: Tensor) -> Tensor:
        """Return the inner divergence's weight, but 0 at 1, so that nothing is centred."""
        return self.divergence.weight(log_ratio) * (log_ratio != 0)

    def summands(self, pair: LogProbPair) -> Summands:
        """Return the terms p f(u), and p w_f(u) for the weights."""
        inner = self.divergence.summands(pair)
        return Summands(
            inner.terms, inner.weights + self.divergence.weight_at_one * pair.student_probs
        )


def uncentred(divergence: Divergence) -> Divergence:
    """Wrap in ``Uncentred``, inside a temperature or a top-k where there is one."""
    if isinstance(divergence, Tempered):
        return Tempered(Uncentred(divergence.divergence), divergence.temperature)
    if isinstance(divergence, TopK):
        return TopK(Uncentred(divergence.divergence), divergence.k)
    return Uncentred(divergence)


def by_library(divergence: Divergence, learner: ModelRole) -> Gradient:
    """Return the gradient in the learner's logits, by the closed form."""

    def gradient(student: Tensor, teacher: Tensor) -> Tensor:
        sides = {"student": student.clone(), "teacher": teacher.clone()}
        leaf = sides[learner].requires_grad_()
        targets = torch.zeros(len(student), dtype=torch.long)
        tile = Tile(sides["student"], sides["teacher"], targets)
        values = ExactDivergence(divergence, learner).measure(tile)
        return torch.autograd.grad(values.sum(), leaf)[0]

    return gradient


def by_trl(beta: float) -> Gradient:
    """Return the gradient in the student's logits, by TRL's loss."""

    def gradient(student: Tensor, teacher: Tensor) -> Tensor:
        leaf = student.clone().requires_grad_()
        loss = GKDTrainer.generalized_jsd_loss(
            leaf[None], teacher[None], beta=beta, reduction="sum"
        )
        return torch.autograd.grad(loss, leaf)[0]

    return gradient


def gradients(name: str) -> dict[str, Gradient]:
    """Return all ways to compute a case's gradient."""
    divergence, learner = CASES[name]
    found = {
        "uncentred": by_library(uncentred(divergence), learner),
        "now": by_library(divergence, learner),
    }
    if name in TRL_BETAS:
        found["TRL"] = by_trl(TRL_BETAS[name])
    return found


def errors(vocab: int, rows: int, seed: int = 0) -> Iterator[dict[str, float | str | int]]:
    """Yield one record per case, way and distance."""
    generator = torch.Generator().manual_seed(seed)
    student = 4 * torch.randn(rows, vocab, generator=generator)
    for delta in DELTAS:
        teacher = student + delta * torch.randn(rows, vocab, generator=generator)
        for name, (divergence, learner) in CASES.items():
            truth = by_library(divergence, learner)(student.double(), teacher.double())
            size = float(truth.norm()) if delta else 1.0
            for way, gradient in gradients(name).items():
                error = float((gradient(student, teacher).double() - truth).norm()) / size
                record = {"vocab": vocab, "delta": delta, "case": name, "way": way}
                yield {**record, "error": error}


def adam_walk(gradient: Gradient, steps: int = 200, rate: float = 1e-3) -> float:
    """Return the largest change of a logit of a student that starts equal to its teacher."""
    start = 4 * torch.randn(8, 1000, generator=torch.Generator().manual_seed(0))
    weights = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([weights], lr=rate, weight_decay=0.0)
    for _ in range(steps):
        weights.grad = gradient(weights.detach(), start) / len(start)
        optimizer.step()
    return float((weights.detach() - start).abs().max())


def main() -> None:
    """Measure, print tables, and write the records to ``--output``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--vocab", type=int, nargs="+", default=[1000, 50_000, 152_000, 262_144])
    parser.add_argument("--rows", type=int, default=3)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    records = [record for vocab in arguments.vocab for record in errors(vocab, arguments.rows)]
    for vocab in arguments.vocab:
        print(f"\n{vocab:,} ids: uncentred / now / TRL\n")
        print("| gradient | " + " | ".join(f"delta {delta:g}" for delta in DELTAS) + " |")
        print("|---" * (1 + len(DELTAS)) + "|")
        for name in CASES:
            cells = []
            for delta in DELTAS:
                own = [
                    r
                    for r in records
                    if (r["vocab"], r["delta"], r["case"]) == (vocab, delta, name)
                ]
                cells.append(" / ".join(f"{r['error']:.1e}" if r["error"] else "0" for r in own))
            print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    print("\nAdamW, 200 steps at 1e-3 from identical logits: largest change of a logit\n")
    walks = {
        name: {way: adam_walk(gradient) for way, gradient in gradients(name).items()}
        for name in list(CASES)[:5]
    }
    for name, ways in walks.items():
        print(f"{name}: " + ", ".join(f"{way} {walk:.1e}" for way, walk in ways.items()))
    if arguments.output:
        arguments.output.write_text(json.dumps({"errors": records, "adam": walks}, indent=1) + "\n")


if __name__ == "__main__":
    main()
