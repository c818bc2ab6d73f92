"""Records that a run and its teacher exchange; they have no behaviour."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import lightning
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from okd_lightning.losses import Term
from okd_lightning.models import DTypeName, ModelSource, Vocabulary
from okd_lightning.records.batches import Example


@dataclass(frozen=True)
class TeacherRun:
    """The run that a teacher belongs to.

    Attributes:
        student: Source of the student.
        tokenizer: The run's tokenizer.
        vocabulary: Ids on which both sides are compared.
        dtype: Number format of a loaded teacher's weights.
        logprob_dtype: Number format of log-probabilities that come from elsewhere.
        attn_implementation: Attention implementation of loaded models.
        packing: Whether rows are packed, where the model supports it.
        compile_blocks: Whether the model's blocks are compiled.
        gradient_checkpointing: Whether a trained part's activations are recomputed.
        ema_decay: Share of a moving average that an optimizer step keeps; None for the default.
        adds_adapter: Whether a new adapter is put on the student, whose base then stays as it was.
        reads_texts: Whether the teacher is within ForeignTeacher; ``tokenizer`` is then its own.
    """

    student: ModelSource
    tokenizer: PreTrainedTokenizerBase
    vocabulary: Vocabulary
    dtype: DTypeName
    logprob_dtype: torch.dtype = torch.float32
    attn_implementation: str | None = None
    packing: bool = True
    compile_blocks: bool = False
    gradient_checkpointing: bool = False
    ema_decay: float | None = None
    adds_adapter: bool = False
    reads_texts: bool = False


@dataclass(frozen=True)
class TeacherOptions:
    """Options of a run that only some kinds of teacher take.

    Attributes:
        teacher_dtype: ``model.teacher_dtype``; None where it is not set.
        ema_decay: ``model.ema_decay``; None where it is not set.
        rounds_steps: Whether the student's trained weights are in 16 bits.
    """

    teacher_dtype: DTypeName | None = None
    ema_decay: float | None = None
    rounds_steps: bool = False


@dataclass(frozen=True)
class Opening:
    """The start of a training run, with the models on their devices.

    Attributes:
        trainer: The run's Trainer.
        terms: The run's terms.
        device: Device of the student.
        read_rows: From the user's option to the dataset responses for which training and validation
            need the teacher, and the rows of a forward pass.
        progress: From trainer, text and number of rows to a context that yields a callback.
    """

    trainer: lightning.Trainer
    terms: Sequence[Term]
    device: torch.device
    read_rows: Callable[[str], tuple[list[Sequence[Example]], int]]
    progress: Callable[[Any, str, int], AbstractContextManager[Callable[[int], None] | None]]


@dataclass(frozen=True)
class GeneratingModels:
    """The models that generate as one.

    Attributes:
        models: At least one.
        context: Context that they need.
        mix: Function from each model's [rows, vocab] logits to those of the sampled distribution;
            None for one model.
    """

    models: tuple[PreTrainedModel, ...]
    context: AbstractContextManager[None] = field(default_factory=nullcontext)
    mix: Callable[[Sequence[Tensor]], Tensor] | None = None
