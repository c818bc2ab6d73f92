"""The module's interface for data and rollouts, and checks that both agree."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from okd_lightning.engines import RolloutEngine, Sampling
from okd_lightning.engines.tool_rollouts import ToolRounds
from okd_lightning.errors import ConfigError
from okd_lightning.losses import Term
from okd_lightning.models import Vocabulary
from okd_lightning.teachers import SelfTeacher


class DistilledModule(RolloutEngine, Protocol):
    """The part of a DistillationModule that its data uses."""

    tokenizer: PreTrainedTokenizerBase
    vocabulary: Vocabulary
    terms: list[Term]
    self_teacher: SelfTeacher | None
    tool_rounds: ToolRounds | None

    @property
    def has_teacher(self) -> bool:
        """True if there is a teacher, including a self-teacher."""

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The ids that end a response."""

    def add_eos_ids(self, ids: Iterable[int]) -> None:
        """Add ids that end a response."""

    def keep_apart(self, ids: Collection[int]) -> None:
        """Take ids after which a response goes on out of the ends."""

    def check_lengths(self, num_tokens: int, teacher_tokens: int | None = None) -> None:
        """Refuse sequences that are too long for the models."""

    def check_sampling(self, sampling: Sampling) -> None:
        """Refuse sampling that the student's engine does not support."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of some ids."""


def check_teacher_prompts(module: DistilledModule, *, are_given: bool) -> None:
    """Refuse teacher prompts without a teacher, and runs that need them and have none.

    Args:
        module: The module, with the run's terms.
        are_given: Whether the data has teacher prompts.

    Raises:
        ConfigError: They do not agree; the message says what to set or leave out.
    """
    options = "--data.teacher_prompt_template or --data.teacher_prompt_column"
    if are_given and not module.has_teacher:
        raise ConfigError(
            f"there is no teacher to read the teacher's prompts: leave {options} out, or give "
            "--model.teacher or --model.self_teacher"
        )
    if are_given:
        return
    for term in module.terms:
        if term.needs_teacher_prompt:
            raise ConfigError(f"method {term.name} needs prompts for the teacher: give {options}")
    if module.self_teacher == "live":
        raise ConfigError(
            "model.self_teacher live without teacher prompts has nothing to teach: both sides are "
            f"one model that reads one text; give {options}"
        )
