"""The NoTeacher: plain SFT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

from okd_lightning.errors import ConfigError
from okd_lightning.losses import Term
from okd_lightning.teachers.base import Teacher


@final
class NoTeacher(Teacher):
    """A run without a teacher: plain SFT."""

    exists = False
    generates = False

    @property
    def arguments(self) -> Mapping[str, Any]:
        """No arguments."""
        return {}

    def check_prompts(self, are_given: bool) -> None:
        """Refuse teacher prompts, which no model would read."""
        if are_given:
            raise ConfigError(
                "there is no teacher to read the teacher's prompts: leave "
                "--data.teacher_prompt_template or --data.teacher_prompt_column out, or give "
                "--model.teacher a folder, a hub id or FrozenSelf"
            )

    def check_term(self, term: Term) -> None:
        """Refuse a method that needs a teacher."""
        if term.asks_teacher or any(q.needs_teacher for q in term.quantities):
            raise ConfigError(
                f"method {term.name} needs a teacher: give --model.teacher a folder or hub id, "
                "or the student itself: --model.teacher FrozenSelf"
            )

    def check_adaptable(self) -> None:
        """Refuse: there is nothing to put a module on."""
        raise ConfigError("an online module needs a teacher: give --model.teacher")
