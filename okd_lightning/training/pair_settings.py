"""The settings of a pair: how a student and its teacher are loaded and run."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from peft import PeftConfig
from transformers import PreTrainedTokenizerBase

from okd_lightning.models import (
    DTypeName,
    EndTokensArgument,
    GivenPair,
    ModelArgument,
    Vocabulary,
    dtype_of,
)
from okd_lightning.teachers import TeacherOptions, TeacherRun


@dataclass(frozen=True)
class PairSettings:
    """The arguments of a DistillationModule that are about its models; see there."""

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

    def teacher_options(self, student: ModelArgument) -> TeacherOptions:
        """Return the options that only some kinds of teacher take."""
        is_16_bits = dtype_of(student, self.dtype) in ("bfloat16", "float16")
        rounds = is_16_bits and self.student_adapter is None
        return TeacherOptions(self.teacher_dtype, self.ema_decay, rounds)

    def teacher_run(
        self, given: GivenPair, tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary
    ) -> TeacherRun:
        """Return what the run's teacher is told."""
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
