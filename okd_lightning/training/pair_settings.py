"""Settings of a pair: loading and running of a student and its teacher."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from peft import PeftConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from okd_lightning.engines.engine import EngineSource
from okd_lightning.engines.memory import memory_of
from okd_lightning.errors import ConfigError
from okd_lightning.models import (
    DTypeName,
    EndTokensArgument,
    GivenPair,
    ModelArgument,
    Vocabulary,
    compile_blocks,
    dtype_of,
    freeze_vision,
    packs_rows,
    recompute_activations,
    say_row_groups,
)
from okd_lightning.models.causal_lm import within_peft
from okd_lightning.teachers import Teacher, TeacherOptions, TeacherRun, trained
from okd_lightning.training.frozen_parts import own_memory


@dataclass(frozen=True)
class PairSettings:
    """The arguments of a DistillationModule that concern its models; see there."""

    tokenizer: str | PreTrainedTokenizerBase | None = None
    dtype: DTypeName = "float32"
    teacher_dtype: DTypeName | None = None
    attn_implementation: str | None = None
    gradient_checkpointing: bool = False
    student_adapter: PeftConfig | None = None
    ema_decay: float | None = None
    tile_positions: int | None = None
    packing: bool = True
    compile_blocks: bool = False
    end_tokens: EndTokensArgument | None = None
    freeze_vision: bool = True

    def __post_init__(self) -> None:
        if self.tile_positions is not None and self.tile_positions < 1:
            raise ConfigError(f"model.tile_positions must be at least 1, got {self.tile_positions}")

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> PairSettings:
        """Return the settings among the arguments of a DistillationModule."""
        return cls(**{field.name: given[field.name] for field in fields(cls)})

    def frozen(self, student: PreTrainedModel) -> PreTrainedModel:
        """Freeze the parts of a loaded student that a self-teacher's copy shares; return it."""
        if self.freeze_vision:
            freeze_vision(student)
        return student

    def prepare(self, student: PreTrainedModel) -> bool:
        """Set a student with its adapter up for training; return whether it gets packed rows."""
        if self.gradient_checkpointing:
            recompute_activations(student, "--model.student")
        packs = packs_rows(student, self.packing, "student")
        say_row_groups(student, "student")
        memory_of(within_peft(student))  # tried before the blocks are compiled
        if self.compile_blocks:
            compile_blocks(student)
        own_memory(trained(student))
        student.train()
        return packs

    def teacher_options(self, student: ModelArgument) -> TeacherOptions:
        """Return the options that only some kinds of teacher take."""
        is_16_bits = dtype_of(student, self.dtype) in ("bfloat16", "float16")
        rounds = is_16_bits and self.student_adapter is None
        return TeacherOptions(self.teacher_dtype, self.ema_decay, rounds)

    def teacher_run(
        self, given: GivenPair, tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary
    ) -> TeacherRun:
        """Return the run's settings for its teacher."""
        own_dtype = dtype_of(given.student, self.dtype)
        return TeacherRun(
            student=given.student,
            tokenizer=tokenizer,
            vocabulary=vocabulary,
            dtype=dtype_of(given.teacher, self.teacher_dtype or self.dtype),
            logprob_dtype=torch.promote_types(getattr(torch, own_dtype), torch.float32),
            attn_implementation=self.attn_implementation,
            packing=self.packing,
            compile_blocks=self.compile_blocks,
            gradient_checkpointing=self.gradient_checkpointing,
            ema_decay=self.ema_decay,
            adds_adapter=given.adapter is not None and not given.has_adapter,
        )


def images_refused(teacher: Teacher, engine: EngineSource | None) -> str | None:
    """Return why a kind of teacher, or the student's engine, reads no images; None if both do."""
    if not teacher.reads_images:
        return f"{type(teacher).__name__} reads none: give --model.teacher a folder or hub id"
    if engine is not None:
        return f"{type(engine).__name__} is sent text alone: leave --model.engine out"
    return None


@contextmanager
def drawing_from_the_seed() -> Iterator[None]:
    """Make random weights depend on the seed alone, not on earlier random numbers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch.initial_seed())
        yield
