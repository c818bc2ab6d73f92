"""The FrozenSelf: the student as it was at the start of training."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from typing import final

from transformers import PreTrainedModel

from okd_lightning.errors import ConfigError
from okd_lightning.teachers.online_module import base_teacher
from okd_lightning.teachers.self_teacher import SelfTeacher, teacher_copy


@final
class FrozenSelf(SelfTeacher):
    """The student with its initial weights: a copy, or with a new student_adapter its base.

    Its own prompts can give it more information than the student: data.teacher_prompt_template.
    """

    _stands_alone = False

    @property
    def _is_base_of_student(self) -> bool:
        return self.run.adds_adapter and not self._stands_alone

    def check_adaptable(self) -> None:
        """Make a copy of the student, also where its base would suffice.

        Raises:
            ConfigError: The models are already built, without a copy.
        """
        if self.student is not None and self.model is None:
            raise ConfigError(
                "this module was built for a method without an online module, with the student's "
                "base as its teacher; make a new DistillationModule for this one"
            )
        self._stands_alone = True

    def student_loaded(self, student: PreTrainedModel) -> None:
        """Copy the student before its adapter is added, unless its base stays frozen."""
        if not self._is_base_of_student:
            self.model = teacher_copy(student)

    def state_of_student(self) -> AbstractContextManager[None]:
        """Disable the student's adapter."""
        assert self.student is not None
        return base_teacher(self.student) if self._is_base_of_student else nullcontext()

    def keeps(self, name: str, trained: Collection[str], frozen: Collection[str]) -> bool:
        """Return True for the copy of a student from memory: that model has been trained since."""
        del frozen
        return name in trained or not isinstance(self.source, str)
