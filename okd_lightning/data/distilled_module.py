"""Interface of the LightningModule that data and rollouts use, and checks that both agree."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from okd_lightning.engines import RolloutEngine, Sampling
from okd_lightning.engines.ahead import AheadEngine
from okd_lightning.engines.tool_rollouts import ToolRounds
from okd_lightning.errors import ConfigError
from okd_lightning.losses import Term
from okd_lightning.models import PairImages, Vocabulary
from okd_lightning.teachers import Teacher


class DistilledPair(Protocol):
    """The part of a module's pair that its data uses."""

    tokenizer: PreTrainedTokenizerBase
    vocabulary: Vocabulary
    images: PairImages
    tool_rounds: ToolRounds | None
    settle: Callable[[], None] | None

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The ids that end a response."""

    @property
    def teacher(self) -> Teacher:
        """The run's teacher."""

    def use_images(self) -> None:
        """Read rows with images, or refuse them."""

    def add_eos_ids(self, ids: Iterable[int]) -> None:
        """Add ids that end a response."""

    def keep_apart(self, ids: Collection[int]) -> None:
        """Remove ids after which a response continues from the end ids."""

    def check_lengths(self, num_tokens: int, teacher_tokens: int) -> None:
        """Refuse sequences that are too long for the models."""

    def check_sampling(self, sampling: Sampling) -> None:
        """Refuse sampling that the student's engine does not support."""


class DistilledModule(RolloutEngine, Protocol):
    """The part of a DistillationModule that its data uses."""

    terms: list[Term]

    @property
    def pair(self) -> DistilledPair:
        """The student and its teacher."""

    def ahead_engine(self, lag: int) -> Callable[[], AheadEngine]:
        """Return the function that starts an engine for rollouts ahead of training."""

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
    for term in module.terms:
        if term.needs_teacher_prompt and not are_given:
            raise ConfigError(
                f"method {term.name} needs prompts for the teacher: give "
                "--data.teacher_prompt_template or --data.teacher_prompt_column"
            )
    module.pair.teacher.check_prompts(are_given)
