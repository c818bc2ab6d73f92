"""The LiveSelf: the student as it is, reading its own prompts."""

from __future__ import annotations

from typing import final

from okd_lightning.errors import ConfigError
from okd_lightning.teachers.self_teacher import SelfTeacher


@final
class LiveSelf(SelfTeacher):
    """The student as it is, without dropout and gradient; it needs prompts of its own.

    Give them by data.teacher_prompt_template.
    """

    follows_student = True

    def check_prompts(self, are_given: bool) -> None:
        """Refuse data without prompts for the teacher: both sides would be equal."""
        if not are_given:
            raise ConfigError(
                "model.teacher LiveSelf without teacher prompts has nothing to teach: both sides "
                "are one model that reads one text; give --data.teacher_prompt_template or "
                "--data.teacher_prompt_column"
            )
