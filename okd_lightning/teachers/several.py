"""Several teachers as one: the common part of ensembles and routed teachers.

Owns the members and forwards the run's calls to them. The kinds define how the members' sides
become one side.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from okd_lightning.errors import ConfigError
from okd_lightning.metrics import adapted_measures
from okd_lightning.models import ModelSource, Vocabulary, check_lengths, dtype_of
from okd_lightning.models.causal_lm import trained
from okd_lightning.teachers.base import Measurement, Teacher
from okd_lightning.teachers.loaded import LoadedTeacher
from okd_lightning.teachers.online_module import OnlineModuleSettings
from okd_lightning.teachers.run import Opening, TeacherRun


class SeveralTeachers(Teacher):
    """Some teachers, each with a model of its own in this process.

    Args:
        members: At least one; each has its own weights.

    Raises:
        ConfigError: A teacher of a kind that cannot be a member.
    """

    def __init__(self, members: Sequence[Teacher]) -> None:
        kind = type(self).__name__
        if not members:
            raise ConfigError(f"{kind} has no teachers: give --model.teacher.teachers some")
        for member in members:
            self.check_member(member)
        self.members = tuple(members)
        self._registered: nn.ModuleDict | None = None

    # ---------------------------------------------------------------- settings

    def check_member(self, member: Teacher) -> None:
        """Refuse a teacher without a model of its own over the run's tokens.

        Raises:
            ConfigError: The message names the kind.
        """
        if member.own_source is None or not member.covers_vocabulary:
            raise ConfigError(
                f"{type(self).__name__} holds a {type(member).__name__}, and its teachers are "
                "models of their own in this process, over the run's tokens: give folders or hub "
                "ids"
            )

    @property
    def own_source(self) -> ModelSource | None:
        """The first member's."""
        return self.members[0].own_source

    @property
    def own_sources(self) -> tuple[ModelSource, ...]:
        """All members'."""
        return tuple(source for member in self.members for source in member.own_sources)

    @property
    def computes_elsewhere(self) -> bool:
        """True if any member's passes are computed on a server."""
        return any(member.computes_elsewhere for member in self.members)

    @property
    def online_module(self) -> OnlineModuleSettings | None:
        """Settings of the members' trained parameters."""
        found = (member.online_module for member in self.members)
        return next((settings for settings in found if settings is not None), None)

    @property
    def adapted_models(self) -> list[tuple[PreTrainedModel, ModelSource | None]]:
        """All members'."""
        return [found for member in self.members for found in member.adapted_models]

    @property
    def models(self) -> tuple[PreTrainedModel, ...]:
        """All members'."""
        return tuple(model for member in self.members for model in member.models)

    @property
    def module(self) -> nn.Module | None:
        """All members' modules, by number."""
        return self._registered

    def use_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Set the vocabulary, also of the members."""
        super().use_vocabulary(vocabulary)
        for member in self.members:
            member.use_vocabulary(vocabulary)

    def join(self, run: TeacherRun) -> Self:
        """Return a copy for ``run``, with copies of the members in their number formats."""
        own = super().join(run)
        own.members = tuple(
            member.join(replace(run, dtype=dtype_of(member.own_source, run.dtype)))
            for member in self.members
        )
        return own

    def config(self, student: PretrainedConfig) -> PretrainedConfig | None:
        """Return none: ``check_length`` reads all members'."""
        del student
        return None

    def check_length(self, num_tokens: int) -> None:
        """Refuse sequences that are too long for a member; the message names it."""
        for member in self.members:
            config = member.config(PretrainedConfig())
            role = f"teacher {source_name(member.own_source)}"
            check_lengths(None, config, num_tokens, num_tokens, role)
            member.check_length(num_tokens)

    def check_adaptable(self) -> None:
        """Refuse: ``adapted`` puts an online module on members alone."""
        raise ConfigError(
            f"an online module is trained on one model, and {type(self).__name__} has several"
        )

    def check_sharding(self) -> None:
        """Check all members."""
        for member in self.members:
            member.check_sharding()

    def with_members(self, change: Callable[[int, Teacher], Teacher]) -> Self:
        """Return a copy with changed members, by number."""
        own = super().join(self.run)
        own.members = tuple(change(number, one) for number, one in enumerate(self.members))
        own._registered = None
        return own

    # ---------------------------------------------------------------- building

    def build(self) -> None:
        """Load all members' models."""
        for member in self.members:
            member.build()
        modules = [(str(number), member.module) for number, member in enumerate(self.members)]
        if self._registered is None:
            found = {name: one for name, one in modules if one is not None}
            self._registered = nn.ModuleDict(found) if found else None

    def student_ready(self, student: PreTrainedModel, packs: bool) -> None:
        """Keep the student, and pass it to the members."""
        super().student_ready(student, packs)
        for member in self.members:
            member.student_ready(student, packs)

    def unload(self) -> None:
        """Remove all members' models from memory."""
        self._registered = None
        for member in self.members:
            member.unload()

    def open(self, opening: Opening) -> None:
        """Open all members."""
        for member in self.members:
            member.open(opening)

    # ---------------------------------------------------------------- running

    def as_base(self) -> AbstractContextManager[None]:
        """Disable all members' trained parameters within the block."""
        return _together([member.as_base() for member in self.members])

    def measurements(self, stage: str, is_own: bool) -> Iterator[Measurement]:
        """Yield the base's measures; on dataset responses also those with an online module."""
        yield from super().measurements(stage, is_own)
        if self.online_module is not None and not is_own:
            yield nullcontext(), adapted_measures(stage)

    # ---------------------------------------------------------------- training and state

    def trained_parameters(self) -> list[nn.Parameter]:
        """Return all members' trained parameters."""
        return trained(self.module)

    def after_step(self) -> None:
        """Update all members after an optimizer step."""
        for member in self.members:
            member.after_step()

    def keeps(self, name: str, trained: Collection[str], frozen: Collection[str]) -> bool:
        """Return the answer of the weight's member, whose number is in the weight's name."""
        if name in trained:
            return True
        number, _, rest = name.removeprefix("teacher.").partition(".")
        return self.members[int(number)].keeps(f"teacher.{rest}", (), frozen)

    def settings(self) -> Mapping[str, Any]:
        """Return its description, and the online module's settings."""
        found: dict[str, Any] = {}
        for member in self.members:
            found |= member.settings()
        return {**found, "teacher": self.mark}

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copy the members too."""
        own = super().__deepcopy__(memo)
        own.members = tuple(deepcopy(member, memo) for member in self.members)
        own._registered = deepcopy(self._registered, memo)
        return own


def source_name(source: ModelSource | None) -> str:
    """Return a model's name without its location: a moved folder keeps it."""
    if isinstance(source, str):
        return Path(source).name if Path(source).expanduser().exists() else source
    if isinstance(source, Mapping):
        return f"random {source.get('model_type')}"
    return "on a server" if source is None else "a model in memory"


def name_of(teacher: Teacher) -> str:
    """Return a member's name, for messages and checkpoints."""
    return teacher.base.mark or source_name(teacher.own_source)


def argument_of(teacher: Teacher) -> Any:
    """Return the constructor's argument for a member: a model, or a teacher."""
    own = teacher.base
    is_plain = isinstance(own, LoadedTeacher) and own.residence == "device"
    return own.own_source if is_plain else own


@contextmanager
def _together(contexts: Sequence[AbstractContextManager[None]]) -> Iterator[None]:
    with ExitStack() as entered:
        for context in contexts:
            entered.enter_context(context)
        yield
