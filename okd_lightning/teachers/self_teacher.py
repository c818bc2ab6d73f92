"""The student as its own teacher: frozen at the start, its moving average, or its present weights.

Owns the copies and their updates; the data module owns the prompts of such a teacher.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Literal, TypeAlias

import torch
from torch import nn
from transformers import PreTrainedModel

from okd_lightning.errors import ConfigError

SelfTeacher: TypeAlias = Literal["frozen", "ema", "live"]
"""The initial student, its exponential moving average, or the present student."""

DEFAULT_EMA_DECAY = 0.99


def check_self_teacher(
    kind: SelfTeacher | None,
    ema_decay: float | None,
    *,
    has_teacher: bool,
    has_dtype: bool,
    is_rounded: bool,
) -> None:
    """Refuse settings that contradict each other.

    Args:
        kind: The kind; None for a separate teacher.
        ema_decay: The user's setting.
        has_teacher: Whether a separate teacher is set.
        has_dtype: Whether a number format of the teacher is set.
        is_rounded: Whether the trained weights are in 16 bits.

    Raises:
        ConfigError: There is a contradiction; the message says what to change.
    """
    if kind not in (None, "frozen", "ema", "live"):
        raise ConfigError(f"model.self_teacher is {kind!r}; expected frozen, ema or live")
    if kind is not None and has_teacher:
        raise ConfigError(
            f"model.self_teacher {kind} makes the student its own teacher, and model.teacher names "
            "another one: leave one of them out (--model.teacher null)"
        )
    if kind is not None and has_dtype:
        raise ConfigError(
            f"model.self_teacher {kind} has the student's number format: leave model.teacher_dtype "
            "out (--model.teacher_dtype null)"
        )
    if ema_decay is not None and kind != "ema":
        raise ConfigError(
            f"model.ema_decay {ema_decay} has nothing to act on: give --model.self_teacher ema, or "
            "leave it out"
        )
    if ema_decay is not None and not 0 < ema_decay < 1:
        raise ConfigError(f"model.ema_decay must be between 0 and 1 (exclusive), got {ema_decay}")
    if kind == "ema" and is_rounded:
        raise ConfigError(
            "model.self_teacher ema adds up small steps, which 16 bits round away: use "
            "--model.dtype float32 with --trainer.precision bf16-mixed, or train an adapter"
        )


def teacher_copy(student: PreTrainedModel) -> PreTrainedModel:
    """Return a frozen copy of ``student`` in eval mode, which shares the untrained weights."""
    # deepcopy's memo: these parameters are shared and not copied
    shared = {id(p): p for p in student.parameters() if not p.requires_grad}
    return deepcopy(student, shared).requires_grad_(False).eval()


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, decay: float) -> None:
    """Move a ``teacher_copy`` towards the student: t ← decay · t + (1 - decay) · s, in place.

    Only the student's trained weights are averaged; nothing carries gradient.
    """
    pairs = [
        (own, trained)
        for own, trained in zip(teacher.parameters(), student.parameters(), strict=True)
        if trained.requires_grad
    ]
    torch._foreach_lerp_([own for own, _ in pairs], [new for _, new in pairs], 1 - decay)


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Set ``model`` to eval mode (no dropout) within the context."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def detached(module: nn.Module) -> nn.Module:
    """Return a frozen copy of ``module`` that shares its memory and gets no gradient."""
    # deepcopy's memo: the copy gets these buffers and detached parameters
    memo: dict[int, torch.Tensor] = {id(buffer): buffer for buffer in module.buffers()}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
    return deepcopy(module, memo).eval()
