"""Loss layer alone: JSD(1/2) and its gradients from hidden states and heads.

Ours against all logits in eager torch and against TRL's chunked divergence, for increasing numbers
of tokens and vocabularies; student width 256, teacher width 512, both heads without bias, the
student's trained. Extra memory is the peak above the memory before the step, without the gradients.

    python benchmarks/loss_layer.py [--steps 5]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from side_by_side import Turns, take_turns, write_results
from torch import Tensor, nn

from okd_lightning.callbacks import DivergenceCallback
from okd_lightning.divergences import JensenShannon
from okd_lightning.losses import (
    Measured,
    Side,
    Term,
    WeightedTerm,
    fused_loss,
)

STUDENT_WIDTH, TEACHER_WIDTH = 256, 512
SIZES = [(512, 8192), (512, 32768), (2048, 8192), (2048, 32768), (8192, 8192)]
Loss = Callable[[Tensor, nn.Linear, Tensor, nn.Linear], Tensor]


def jensen_shannon() -> Term:
    """Return the term for the mean JSD(1/2)."""
    return DivergenceCallback(JensenShannon(0.5)).term


def ours(student: Tensor, head: nn.Linear, teacher: Tensor, teacher_head: nn.Linear) -> Tensor:
    """Compute the fused loss."""
    zeros = torch.zeros(len(student), dtype=torch.int64)
    about = Measured({}, zeros, zeros, torch.zeros(len(student)))
    terms = [WeightedTerm(jensen_shannon(), 1.0 / len(student))]
    sides = Side(student, head), Side(teacher, teacher_head)
    return fused_loss(terms, *sides, zeros, about, head.out_features).total


def eager(student: Tensor, head: nn.Linear, teacher: Tensor, teacher_head: nn.Linear) -> Tensor:
    """Compute the loss from all logits, with autograd."""
    log_p = head(student).log_softmax(-1)
    with torch.no_grad():
        log_q = teacher_head(teacher).log_softmax(-1)
    log_m = torch.logaddexp(log_p, log_q) - torch.tensor(2.0).log()
    of_teacher = (log_q.exp() * (log_q - log_m)).sum(-1)
    of_student = (log_p.exp() * (log_p - log_m)).sum(-1)
    return (0.5 * of_teacher + 0.5 * of_student).mean()


def trl(student: Tensor, head: nn.Linear, teacher: Tensor, teacher_head: nn.Linear) -> Tensor:
    """Compute TRL's ChunkedDivergenceFunction."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction  # noqa: PLC0415

    sides = (student, head.weight, None, teacher, teacher_head.weight, None)
    divergence: Tensor = ChunkedDivergenceFunction.apply(*sides, 0.5)[0]
    return divergence.mean()


CONTENDERS: dict[str, Loss] = {"ours": ours, "eager": eager, "trl": trl}


def run(loss: Loss, tokens: int, vocab: int) -> None:
    """Run one step per turn."""
    turns = Turns()
    torch.manual_seed(0)
    student = torch.randn(tokens, STUDENT_WIDTH).requires_grad_()
    teacher = torch.randn(tokens, TEACHER_WIDTH)
    head = nn.Linear(STUDENT_WIDTH, vocab, bias=False)
    teacher_head = nn.Linear(TEACHER_WIDTH, vocab, bias=False).requires_grad_(False)
    loss(student[:2], head, teacher[:2], teacher_head).backward()  # libraries' own buffers
    student.grad = head.weight.grad = None
    while True:
        turns.next()
        loss(student, head, teacher, teacher_head).backward()
        student.grad = head.weight.grad = None


def measure(tokens: int, vocab: int, steps: int) -> dict[str, Any]:
    """Measure all contenders at one size."""
    size = ["--tokens", str(tokens), "--vocab", str(vocab)]
    found = take_turns(__file__, {name: [name, *size] for name in CONTENDERS}, steps)
    gradients_mb = (tokens + vocab) * STUDENT_WIDTH * 4 / 2**20
    for contender in found.values():
        grown = contender["peak_mb"] - contender["before_mb"] - gradients_mb
        contender["extra_mb"] = round(max(0.0, grown), 1)
    fastest = {name: contender["median_seconds"] for name, contender in found.items()}
    return {
        "tokens": tokens,
        "vocab": vocab,
        "time_over_eager": round(fastest["ours"] / fastest["eager"], 3),
        "time_over_trl": round(fastest["ours"] / fastest["trl"], 3),
        "contenders": found,
    }


def main() -> None:
    """Measure all sizes, or run as one contender at one of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--tokens", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--vocab", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    if options.contender:
        run(CONTENDERS[options.contender], options.tokens, options.vocab)
        return
    write_results("loss_layer", {"sizes": [measure(*size, options.steps) for size in SIZES]})


if __name__ == "__main__":
    main()
