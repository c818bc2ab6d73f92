"""The AveragedSelf: the exponential moving average of the student's trained weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import final

import torch
from torch import nn
from transformers import PreTrainedModel

from okd_lightning.errors import ConfigError
from okd_lightning.teachers.run import TeacherOptions
from okd_lightning.teachers.self_teacher import SelfTeacher, teacher_copy

DEFAULT_EMA_DECAY = 0.99


@final
class AveragedSelf(SelfTeacher):
    """The exponential moving average of the student's trained weights; model.ema_decay sets it.

    Its own prompts can give it more information than the student: data.teacher_prompt_template.
    """

    follows_student = True

    def check_options(self, options: TeacherOptions) -> None:
        """Refuse a decay that averages nothing, and weights that round small steps away."""
        decay = options.ema_decay
        if decay is not None and not 0 < decay < 1:
            raise ConfigError(f"model.ema_decay must be between 0 and 1 (exclusive), got {decay}")
        if options.rounds_steps:
            raise ConfigError(
                "model.teacher AveragedSelf averages small changes of the weights, which 16-bit "
                "formats round to zero: use "
                "--model.dtype float32 with --trainer.precision bf16-mixed, or train an adapter"
            )
        super().check_options(TeacherOptions(options.teacher_dtype))

    def student_adapted(self, student: PreTrainedModel) -> None:
        """Start from a copy of the student."""
        self.model = teacher_copy(student)

    def after_step(self) -> None:
        """Average the student's new weights into the copy."""
        assert self.model is not None
        assert self.student is not None
        decay = self.run.ema_decay
        follow(self.model, self.student, DEFAULT_EMA_DECAY if decay is None else decay)

    def keeps(self, name: str, trained: Collection[str], frozen: Collection[str]) -> bool:
        """Return True for a weight whose counterpart in the student is stored."""
        is_trained = name.replace("teacher.", "student.", 1) in trained
        return is_trained or isinstance(self.source, Mapping) or name not in frozen


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, decay: float) -> None:
    """Average the student's weights into a copy, in place: t ← decay · t + (1 - decay) · s.

    Only the student's trained weights are averaged; nothing carries gradient.
    """
    pairs = [
        (own, trained)
        for own, trained in zip(teacher.parameters(), student.parameters(), strict=True)
        if trained.requires_grad
    ]
    torch._foreach_lerp_([own for own, _ in pairs], [new for _, new in pairs], 1 - decay)
