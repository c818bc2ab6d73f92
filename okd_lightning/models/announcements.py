"""What a run says about its models when it begins."""

from __future__ import annotations

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from okd_lightning.models.self_teacher import SelfTeacher


def announce_models(
    student: nn.Module | None, teacher: nn.Module | None, self_teacher: SelfTeacher | None
) -> None:
    """Say how large both are and how much of them is trained."""
    for name, model in (("student", student), ("teacher", teacher)):
        if model is not None:
            sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
            total, trained = sum(n for n, _ in sizes), sum(n for n, t in sizes if t)
            rank_zero_info(f"{name}: {total:,} parameters, {trained:,} trained")
    if self_teacher is not None:
        rank_zero_info(f"the student is its own teacher ({self_teacher})")


def warn_of_rounding(learning_rate: float) -> None:
    """Warn of a student whose trained weights are bfloat16.

    Args:
        learning_rate: Of the run.
    """
    rank_zero_warn(
        "the student's own weights are bfloat16, which keeps 8 bits of each: steps of a "
        f"small learning rate (here {learning_rate:g}) mostly round to nothing; give "
        "--model.dtype float32 with --trainer.precision bf16-mixed, or a student_adapter"
    )
