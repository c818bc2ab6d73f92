"""The AdaptiveTeacher: another teacher with a trained online module (OKD)."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import replace
from typing import Any, Self, cast, final

import torch
from transformers import PretrainedConfig, PreTrainedModel

from okd_lightning.losses import Side, Term
from okd_lightning.metrics import adapted_measures
from okd_lightning.models import LMHead, ModelSource, Vocabulary
from okd_lightning.models.packing import tried
from okd_lightning.records.batches import DistillBatch
from okd_lightning.teachers.base import Measurement, Teacher
from okd_lightning.teachers.loaded import LoadedTeacher
from okd_lightning.teachers.online_module import (
    OnlineModuleSettings,
    WithinContext,
    attach_online_module,
    base_teacher,
)
from okd_lightning.teachers.run import Opening, TeacherOptions, TeacherRun


@final
class AdaptiveTeacher(Teacher):
    """A frozen teacher with an online module that the optimizer trains with the student.

    Methods add it (``DistillationModule.add_online_module``). Measures and generation use the
    teacher without the module.

    Args:
        inner: A teacher with constant weights: a LoadedTeacher or a FrozenSelf.
        settings: The module and how it is optimised.

    Raises:
        ConfigError: ``inner`` cannot have a module.
    """

    text_losses = LoadedTeacher.text_losses

    def __init__(self, inner: Teacher, settings: OnlineModuleSettings) -> None:
        inner.check_adaptable()
        self.inner = inner
        self._settings = settings

    @property
    def own_source(self) -> ModelSource | None:
        """The inner teacher's."""
        return self.inner.own_source

    @property
    def arguments(self) -> Mapping[str, Any]:
        """The inner teacher and the module."""
        return {"inner": self.inner, "settings": self._settings}

    @property
    def base(self) -> Teacher:
        """The inner teacher, whose description is stored separately from the module."""
        return self.inner.base

    @property
    def source(self) -> ModelSource | None:
        """The inner teacher's."""
        return self.inner.source

    @property
    def mark(self) -> str | None:
        """The inner teacher's."""
        return self.inner.mark

    @property
    def online_module(self) -> OnlineModuleSettings:
        """Settings of the module and of its optimizer group."""
        return self._settings

    def check_options(self, options: TeacherOptions) -> None:
        """Check the arguments for the inner teacher."""
        self.inner.check_options(options)

    def use_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Set the vocabulary, also of the inner teacher."""
        super().use_vocabulary(vocabulary)
        self.inner.use_vocabulary(vocabulary)

    def join(self, run: TeacherRun) -> Self:
        """Return a copy for ``run``, with a copy of the inner teacher."""
        own = super().join(run)
        own.inner = self.inner.join(run)
        return own

    def config(self, student: PretrainedConfig) -> PretrainedConfig | None:
        """Return the inner teacher's config."""
        return self.inner.config(student)

    def check_prompts(self, are_given: bool) -> None:
        """Check the arguments for the inner teacher."""
        self.inner.check_prompts(are_given)

    def check_term(self, term: Term) -> None:
        """Check the argument for the inner teacher."""
        self.inner.check_term(term)

    def student_loaded(self, student: PreTrainedModel) -> None:
        """Pass the student to the inner teacher."""
        self.inner.student_loaded(student)

    def student_adapted(self, student: PreTrainedModel) -> None:
        """Pass the student to the inner teacher."""
        self.inner.student_adapted(student)

    def student_ready(self, student: PreTrainedModel, packs: bool) -> None:
        """Pass the student to the inner teacher."""
        self.inner.student_ready(student, packs)

    def build(self) -> None:
        """Build the inner teacher, and put the module on its model, once."""
        self.inner.build()
        if self.model is not None or self.inner.model is None:
            return
        adapted = attach_online_module(
            self.inner.model,
            self._settings.config,
            "--method.online_module",
            self.run.gradient_checkpointing,
        )
        self.model = cast(PreTrainedModel, adapted)  # a PeftModel forwards the attributes of one
        self.packs = tried(self.model, self.run.packing)

    def open(self, opening: Opening) -> None:
        """Open the inner teacher."""
        self.inner.open(opening)

    def base_side(self, batch: DistillBatch) -> Side:
        """Return the side without the module, which may be on the head as well."""
        with torch.no_grad(), self.as_base():
            side = self.side(batch, ())
        assert isinstance(side.head, LMHead)
        within = WithinContext(side.head.module, self.as_base)
        return replace(side, head=replace(side.head, module=within))

    def as_base(self) -> AbstractContextManager[None]:
        """Disable the module within the block."""
        assert self.model is not None
        return base_teacher(self.model)

    def measurements(self, stage: str, is_own: bool) -> Iterator[Measurement]:
        """Yield the base's measures; on dataset responses also those with the module."""
        yield from super().measurements(stage, is_own)
        if not is_own:
            yield super().as_base(), adapted_measures(stage)

    def keeps(self, name: str, trained: Collection[str], frozen: Collection[str]) -> bool:
        """Return True for the module's weights; else the inner teacher's answer."""
        return self.inner.keeps(name, trained, frozen)

    def settings(self) -> Mapping[str, Any]:
        """Return the inner teacher's and the module's settings."""
        own = self._settings
        values = {field.name: getattr(own, field.name) for field in dataclasses.fields(own)}
        given = {name: value for name, value in values.items() if value is not None}
        return {**self.inner.settings(), "online_module": given}

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copy the inner teacher too."""
        own = super().__deepcopy__(memo)
        own.inner = deepcopy(self.inner, memo)
        return own
