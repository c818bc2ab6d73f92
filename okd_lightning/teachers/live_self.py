"""The LiveSelf: the present student, with the teacher's own prompts."""

from __future__ import annotations

from typing import final

from okd_lightning.errors import ConfigError
from okd_lightning.teachers.self_teacher import SelfTeacher


@final
class LiveSelf(SelfTeacher):
    """The present student, without dropout and gradient; it needs teacher prompts.

    Give them by data.teacher_prompt_template.
    """

    follows_student = True

    def check_prompts(self, are_given: bool) -> None:
        """Refuse data without prompts for the teacher: both sides would be equal."""
        if not are_given:
            raise ConfigError(
                "model.teacher LiveSelf without teacher prompts gives no loss: both sides are one "
                "model that reads one text; give --data.teacher_prompt_template or "
                "--data.teacher_prompt_column"
            )
