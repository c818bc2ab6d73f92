"""The LoadedTeacher: a frozen model that is read from a folder, a hub id, a config or memory."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any, Self, final

from transformers import PreTrainedModel

from okd_lightning.models import ModelArgument, ModelSource, compile_blocks, load_checked
from okd_lightning.models.adapters import model_source
from okd_lightning.models.packing import tried
from okd_lightning.teachers.base import Teacher
from okd_lightning.teachers.no_teacher import NoTeacher


@final
class LoadedTeacher(Teacher):
    """A frozen model in memory: what ``--model.teacher PATH`` means.

    Args:
        model: Folder, hub id (org/name or org/name@revision), PEFT folder (merged into its base),
            .gguf file, or a config with random weights: a mapping with model_type and that
            architecture's fields. From Python also a model.
    """

    has_layers = True
    text_losses = ("text", "chunk", "next_byte", "shared_tokens")

    def __init__(self, model: ModelArgument) -> None:
        self._given = model_source(model, "teacher")

    @property
    def own_source(self) -> ModelSource:
        """The user's model."""
        return self._given

    @property
    def arguments(self) -> Mapping[str, Any]:
        """The user's model."""
        return {"model": self._given}

    def build(self) -> None:
        """Load it once."""
        if self.model is None:
            self.model = self.load()

    def load(self) -> PreTrainedModel:
        """Load the model, frozen and in eval mode; it is not kept.

        Raises:
            ModelError: It cannot be loaded, or is not causal.
        """
        run = self.run
        teacher = load_checked(
            self._given,
            "--model.teacher",
            run.vocabulary.size,
            dtype=run.dtype,
            attn_implementation=run.attn_implementation,
        )
        self.packs = tried(teacher, run.packing)
        if run.compile_blocks:
            compile_blocks(teacher)
        return teacher.requires_grad_(False).eval()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copy a model in memory that is not in use yet: a module may be put on it."""
        own = super().__deepcopy__(memo)
        if self.model is None:
            own._given = deepcopy(self._given, memo)
        return own


def teacher_of(given: ModelArgument | Teacher | None) -> Teacher:
    """Return a user's teacher: none, a model in any of its forms, or a Teacher."""
    if isinstance(given, Teacher):
        return given
    return NoTeacher() if given is None else LoadedTeacher(given)
