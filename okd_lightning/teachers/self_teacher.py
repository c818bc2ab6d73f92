"""The student as its own teacher: the common part of its three kinds.

Owns copies of the student, and the student run as a teacher. The data module owns the prompts of
such a teacher.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from okd_lightning.errors import ConfigError
from okd_lightning.losses import Quantity, Side
from okd_lightning.models import LMHead, ModelSource
from okd_lightning.models.causal_lm import in_eval_mode
from okd_lightning.models.reading import model_side
from okd_lightning.records.batches import DistillBatch
from okd_lightning.teachers.base import Teacher
from okd_lightning.teachers.run import GeneratingModels, Opening, TeacherOptions


class SelfTeacher(Teacher):
    """The student as its own teacher, in the state that a subclass defines.

    Without ``model``, the student itself is run: in eval mode, without gradient.
    """

    has_layers = True

    @property
    def arguments(self) -> Mapping[str, Any]:
        """No arguments."""
        return {}

    @property
    def mark(self) -> str:
        """The kind: the weights of another one are not in the checkpoint."""
        return type(self).__name__

    @property
    def source(self) -> ModelSource:
        """The student's source."""
        return self.run.student

    def check_options(self, options: TeacherOptions) -> None:
        """Refuse a number format of the teacher: it is the student's."""
        if options.teacher_dtype is not None:
            raise ConfigError(
                f"model.teacher {type(self).__name__} has the student's number format: leave "
                "model.teacher_dtype out (--model.teacher_dtype null)"
            )
        super().check_options(options)

    def config(self, student: PretrainedConfig) -> PretrainedConfig:
        """Return the student's config."""
        return student

    def check_adaptable(self) -> None:
        """Refuse: a teacher that follows the student has no constant weights."""
        raise ConfigError(
            f"model.teacher {type(self).__name__} follows the student, and an online module is "
            "trained on a teacher with constant weights: use --model.teacher FrozenSelf, or "
            "another method"
        )

    def open(self, opening: Opening) -> None:
        """Log that the student is its own teacher."""
        del opening
        rank_zero_info(f"the student is its own teacher ({type(self).__name__})")

    def side(self, batch: DistillBatch, quantities: Sequence[Quantity]) -> Side:
        """Return the side of the copy, or of the student with a head that gets no gradient."""
        if self.model is not None:
            return super().side(batch, quantities)
        assert self.student is not None
        vocabulary = self.run.vocabulary
        with torch.no_grad(), self.as_teacher():
            reads, packs = batch.teacher_reads, self.packs_student
            side = model_side(self.student, reads, packs, vocabulary, quantities)
            head = LMHead.of(self.student, vocabulary)
            return replace(side, head=replace(head, module=detached(head.module)))

    def generator(self) -> GeneratingModels:
        """Return the copy, or the student as a teacher."""
        if self.model is not None:
            return super().generator()
        assert self.student is not None
        return GeneratingModels((self.student,), self.as_teacher())

    @contextmanager
    def as_teacher(self) -> Iterator[None]:
        """Put the student into eval mode within the block, in the teacher's state."""
        assert self.student is not None
        with in_eval_mode(self.student), self.state_of_student():
            yield

    def state_of_student(self) -> AbstractContextManager[None]:
        """Set the student's state as a teacher within the block; by default its present one."""
        return nullcontext()

    def settings(self) -> Mapping[str, Any]:
        """Return the kind."""
        return {"teacher": type(self).__name__}


def teacher_copy(student: PreTrainedModel) -> PreTrainedModel:
    """Return a frozen copy of ``student`` in eval mode, which shares the untrained weights."""
    # deepcopy's memo: these parameters are shared and not copied
    shared = {id(p): p for p in student.parameters() if not p.requires_grad}
    return deepcopy(student, shared).requires_grad_(False).eval()


def detached(module: nn.Module) -> nn.Module:
    """Return a frozen copy of ``module`` that shares its memory and gets no gradient."""
    # deepcopy's memo: the copy gets these buffers and detached parameters
    memo: dict[int, torch.Tensor] = {id(buffer): buffer for buffer in module.buffers()}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
    return deepcopy(module, memo).eval()
