"""Bias and error of one step by the divisor of sampled rows, in the toy of the enumeration test.

    python benchmarks/unbiased.py [--steps 20000]
    python benchmarks/unbiased.py --enumerate

Every response of a tabular student (``tests/losses/test_unbiased.py``) has its exact gradient and
probability; steps of 1, 2, 8 and 64 rollouts are sampled from them. *Along* is the mean step along
the true gradient over its length (1 = unbiased) with its standard error; *RMSE* is the error of one
step over that length, and again with steps clipped to twice that length. ``running_mean`` divides
by the mean length of 256 rollouts sampled before. ``--enumerate`` samples nothing: it prints the
bias of a step of one rollout over the length of the true gradient, for every divergence, variant
and discount.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

TESTS = Path(__file__).parents[1] / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "losses")]

from test_unbiased import DIVERGENCES, RESPONSES, Student  # noqa: E402

from okd_lightning.callbacks import GKD, DistillationCallback, OPDPlus  # noqa: E402
from okd_lightning.divergences import ReverseKL  # noqa: E402

METHODS = {
    "exact (GKD)": GKD(divergence=ReverseKL(), on_policy_fraction=1.0),
    "as_published": OPDPlus(ReverseKL(), "as_published"),
    "centred": OPDPlus(ReverseKL(), "centred"),
    "value_baseline": OPDPlus(ReverseKL(), "value_baseline"),
}
EARLIER = 256
VARIANTS = ("as_published", "centred", "value_baseline")


def figures(steps: Tensor, truth: Tensor) -> str:
    """Return along with its standard error, and both errors, from [steps, parameters]."""
    size = truth.norm()
    along = steps @ truth / size**2
    norms = steps.norm(dim=1, keepdim=True)
    clipped = steps * (2 * size / norms.clamp(min=1e-12)).clamp(max=1)
    rmse, rmse_clipped = (
        float(((some - truth).norm(dim=1) / size).square().mean().sqrt())
        for some in (steps, clipped)
    )
    error = float(along.std()) / len(along) ** 0.5
    return f"{float(along.mean()):.3f} ± {error:.3f} | {rmse:.3f} | {rmse_clipped:.3f}"


def biases(student: Student, method: DistillationCallback, truth: Tensor) -> tuple[float, float]:
    """Return the relative bias of a step of one rollout, by ``running_mean`` and ``token_mean``."""
    chances = torch.tensor([student.chance(r) for r in RESPONSES], dtype=torch.float64)
    lengths = torch.tensor([float(len(response)) for response in RESPONSES]).double()
    found = torch.stack([student.gradient_of(method, r).flatten() for r in RESPONSES])
    by_tokens = (chances * (chances @ lengths) / lengths) @ found
    size = truth.norm()
    return float((chances @ found - truth).norm() / size), float((by_tokens - truth).norm() / size)


def enumerated() -> None:
    """Print all divergences: the largest bias by ``running_mean``, all by token_mean."""
    student = Student()
    print("| divergence | γ | running_mean, at most | exact | " + " | ".join(VARIANTS) + " |")
    print("|---|---|---|---|" + "---|" * len(VARIANTS))
    for divergence in DIVERGENCES:
        for discount in (0, 1):
            objective = student.objective(divergence, discount)
            (truth,) = torch.autograd.grad(objective, student.logits)
            methods: list[DistillationCallback] = [
                OPDPlus(divergence, variant, float(discount)) for variant in VARIANTS
            ]
            if not discount:
                methods.insert(0, GKD(divergence=divergence, on_policy_fraction=1.0))
            found = [biases(student, method, truth.flatten()) for method in methods]
            cells = ["–"] * discount + [f"{by_tokens:.2f}" for _, by_tokens in found]
            worst = max(running for running, _ in found)
            print(f"| {divergence!r} | {discount} | {worst:.0e} | {' | '.join(cells)} |")


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--enumerate", action="store_true")
    arguments = parser.parse_args()
    num_steps = arguments.steps
    torch.set_num_threads(1)
    if arguments.enumerate:
        enumerated()
        return
    student, generator = Student(), torch.Generator().manual_seed(0)
    chances = torch.tensor([student.chance(r) for r in RESPONSES], dtype=torch.float64)
    lengths = torch.tensor([float(len(response)) for response in RESPONSES]).double()
    mean = float(chances @ lengths)
    spread = float(chances @ (lengths - mean) ** 2) ** 0.5
    (truth,) = torch.autograd.grad(student.objective(ReverseKL(), 0), student.logits)
    truth = truth.flatten()
    print(f"reverse KL; lengths {mean:.2f} ± {spread:.2f}; {num_steps} steps\n")
    print(
        "| credit | rollouts | divisor | along | RMSE | RMSE, clipped |\n|---|---|---|---|---|---|"
    )
    for name, method in METHODS.items():
        found = torch.stack([student.gradient_of(method, r).flatten() for r in RESPONSES])
        for rollouts in (1, 2, 8, 64):
            shape = num_steps, rollouts
            drawn = torch.multinomial(chances, num_steps * rollouts, True, generator=generator)
            earlier = torch.multinomial(chances, num_steps * EARLIER, True, generator=generator)
            sums = found[drawn].view(*shape, -1).sum(1)
            tokens = lengths[drawn].view(shape).sum(1, keepdim=True)
            running = lengths[earlier].view(num_steps, -1).mean(1, keepdim=True)
            for by, divisor in (("token_mean", tokens), ("running_mean", rollouts * running)):
                cells = figures(sums * mean / divisor, truth)
                print(f"| {name} | {rollouts} | `{by}` | {cells} |", flush=True)


if __name__ == "__main__":
    main()
