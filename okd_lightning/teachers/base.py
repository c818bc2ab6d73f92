"""The teacher of a run: one interface for all kinds of teachers.

Owns the interface and its defaults, which are those of a frozen model in memory. Each kind is one
final class in a file of its own; no other code depends on the kind.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy, deepcopy
from dataclasses import replace
from typing import Any, ClassVar, Self, TypeAlias

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from okd_lightning.errors import ConfigError
from okd_lightning.losses import Quantity, Side, Term, WeightedTerm
from okd_lightning.losses.states import layers_read
from okd_lightning.metrics import measures
from okd_lightning.models import ModelSource, Vocabulary, load_model_config, max_positions
from okd_lightning.models.causal_lm import trained
from okd_lightning.models.packing import tried
from okd_lightning.models.reading import model_side
from okd_lightning.models.retokenization import TextLoss
from okd_lightning.records.batches import DistillBatch, TrainingRow
from okd_lightning.records.collation import RowReader
from okd_lightning.records.requests import Prompt
from okd_lightning.records.sequences import Sequences
from okd_lightning.teachers.host_weights import HostWeights
from okd_lightning.teachers.online_module import OnlineModuleSettings
from okd_lightning.teachers.run import GeneratingModels, Opening, TeacherOptions, TeacherRun

Measurement: TypeAlias = tuple[AbstractContextManager[None], dict[str, Quantity]]
"""A context, and metric name → quantity, to be measured within it."""


class Teacher(ABC):
    """Abstract teacher of a run.

    The defaults are those of a frozen model in memory (``model``); a kind overrides what differs.
    An instance holds a user's settings until ``join`` attaches it to a run. A complete one, for
    which all ids are equally likely (``--model.teacher my_module.Uniform``):

        class Uniform(Teacher):
            generates = False
            arguments = {}

            def side(self, batch, quantities):
                positions = len(batch.teacher_reads.targets)
                return Side(torch.zeros(positions, self.run.vocabulary.size), nn.Identity())

    Attributes:
        tokenizer: The teacher's own tokenizer, where it differs from the run's; None where it reads
            the run's ids.
        model: Weights in memory, which the module registers as ``teacher``; None without any.
        host_weights: Its weights, where they are in host memory between its passes.
        packs: Whether ``model`` gets packed rows.
        student: The student, for kinds that read it; None before it is built.
        packs_student: Whether the student gets packed rows.
    """

    option: ClassVar[str] = "--model.teacher"
    """Option of this teacher, for messages."""

    exists: ClassVar[bool] = True
    """True where there is a teacher at all."""

    generates: ClassVar[bool] = True
    """True where it can generate responses."""

    to_generate: ClassVar[str] = "give --model.teacher a folder or hub id"
    """Advice for messages of a teacher that cannot generate."""

    covers_vocabulary: bool = True
    """True where its side has a logit for every id of the vocabulary."""

    has_layers: ClassVar[bool] = False
    """True where ``side`` gives the states of its layers."""

    text_losses: ClassVar[tuple[TextLoss, ...]] = ()
    """Losses over texts that it serves within ForeignTeacher, the default first."""

    reads_images: bool = True
    """True where it reads rows with images."""

    follows_student: ClassVar[bool] = False
    """True where its weights follow the student's, apart from trained parameters of its own."""

    tokenizer: PreTrainedTokenizerBase | None = None
    model: PreTrainedModel | None = None
    host_weights: HostWeights | None = None
    packs: bool = False
    student: PreTrainedModel | None = None
    packs_student: bool = False
    run: TeacherRun

    # ---------------------------------------------------------------- settings

    @property
    def own_source(self) -> ModelSource | None:
        """Source of its own weights; None for a self-teacher, or one that is not loaded."""
        return None

    @property
    def own_sources(self) -> tuple[ModelSource, ...]:
        """Sources of all of the teacher's own models."""
        return () if self.own_source is None else (self.own_source,)

    @property
    def computes_elsewhere(self) -> bool:
        """True if a server computes its passes, whose CPU time a run cannot count."""
        return False

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the teachers that rows choose from; none where there is one for all rows."""
        return ()

    @property
    @abstractmethod
    def arguments(self) -> Mapping[str, Any]:
        """The constructor's arguments, as a checkpoint stores them."""

    @property
    def base(self) -> Teacher:
        """The teacher without the online modules that methods of the run have added."""
        return self

    @property
    def source(self) -> ModelSource | None:
        """Source of its weights, the student's for a self-teacher; None where none are loaded."""
        return self.own_source

    @property
    def mark(self) -> str | None:
        """Description in checkpoints: a run resumes only with an equal one; None accepts any."""
        return None

    @property
    def online_module(self) -> OnlineModuleSettings | None:
        """Settings of its trained parameters and of their optimizer group; None without any."""
        return None

    @property
    def adapted_models(self) -> list[tuple[PreTrainedModel, ModelSource | None]]:
        """Models with an online module, each with the source of its base."""
        model = None if self.online_module is None else self.model
        return [] if model is None else [(model, self.source)]

    @property
    def models(self) -> tuple[PreTrainedModel, ...]:
        """Models in memory; each is placed and checked by itself."""
        return () if self.model is None else (self.model,)

    @property
    def module(self) -> nn.Module | None:
        """Module that the run's module registers as ``teacher``."""
        return self.model

    def check_options(self, options: TeacherOptions) -> None:
        """Refuse options that have no effect, or contradict this teacher.

        Raises:
            ConfigError: The message says what to change.
        """
        if options.ema_decay is not None:
            raise ConfigError(
                f"model.ema_decay {options.ema_decay} has no effect: give "
                "--model.teacher AveragedSelf, or leave it out"
            )

    def for_student(self, tokenizer: Callable[[], PreTrainedTokenizerBase]) -> Teacher:
        """Return the teacher that serves a student with this tokenizer; before ``join``."""
        del tokenizer
        return self

    def join(self, run: TeacherRun) -> Self:
        """Return a copy of this teacher that belongs to ``run``."""
        own = copy(self)
        own.run = run
        return own

    def use_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Take the run's vocabulary with other end ids; before training."""
        self.run = replace(self.run, vocabulary=vocabulary)

    def during(self, is_training: bool) -> Teacher:
        """Return the teacher that is used in training, or in any other command."""
        del is_training
        return self

    def config(self, student: PretrainedConfig) -> PretrainedConfig | None:
        """Return the model config that limits the length of its input; None where there is none."""
        del student
        if self.source is None:
            return None
        return load_model_config(self.source, "--model.teacher", self.run.vocabulary.size)

    def check_length(self, num_tokens: int) -> None:
        """Refuse, before training, sequences that are too long for other reasons than ``config``.

        Raises:
            ConfigError: Too long; the message names both lengths.
        """
        del num_tokens

    def context_length(self) -> int | None:
        """Return the tokens of prompt and response that it reads; None for any number."""
        config = self.config(PretrainedConfig())
        return None if config is None else max_positions(config)

    def check_prompts(self, are_given: bool) -> None:
        """Refuse data with, or without, prompts for the teacher.

        Raises:
            ConfigError: This teacher cannot use them, or needs them.
        """
        del are_given

    def check_term(self, term: Term) -> None:
        """Refuse a method that this teacher cannot serve.

        Raises:
            ConfigError: The message says what is missing.
        """
        if layers_read(term.quantities, "teacher") and not self.has_layers:
            raise ConfigError(
                f"method {term.name} reads hidden states of the teacher's layers, and "
                f"{type(self).__name__} gives none: give --model.teacher a folder or hub id, or "
                "leave the method out"
            )
        if term.asks_teacher and not self.generates:
            raise ConfigError(
                f"method {term.name} has the teacher generate responses, and "
                f"{type(self).__name__} generates none: {self.to_generate}"
            )

    def check_text_term(self, term: Term) -> None:
        """Refuse a method that it cannot serve within ForeignTeacher, as ``check_term`` does."""
        del term

    def check_adaptable(self) -> None:
        """Refuse an online module, or prepare a model of its own for one."""
        return

    def check_sharding(self) -> None:
        """Refuse sharding over ranks (fsdp2) where its weights cannot be sharded."""
        return

    def adapted(self, adapt: Callable[[Teacher], Teacher]) -> Teacher:
        """Return this teacher with an online module; ``adapt`` wraps a teacher of one model."""
        return adapt(self)

    # ---------------------------------------------------------------- building

    def student_loaded(self, student: PreTrainedModel) -> None:
        """Use the loaded student, for instance copy it, before a new adapter is put on it."""
        del student

    def student_adapted(self, student: PreTrainedModel) -> None:
        """Use the student with its trained parameters, for instance copy it."""
        del student

    def student_ready(self, student: PreTrainedModel, packs: bool) -> None:
        """Store the student in its final form for loss and generation."""
        self.student, self.packs_student = student, packs

    def build(self) -> None:
        """Load ``model`` where it is needed; called again for every command."""
        if self.model is not None:
            self.packs = tried(self.model, self.run.packing)

    def unload(self) -> None:
        """Remove all models from memory."""
        self.model = None

    def identity(self, digest: Callable[[ModelSource], str]) -> str:
        """Return a digest that is equal for teachers of equal distributions.

        Args:
            digest: Returns a digest that is equal for equal models.
        """
        assert self.own_source is not None
        return digest(self.own_source)

    def open(self, opening: Opening) -> None:
        """Prepare a training run, once models and data are known.

        Raises:
            OKDLightningError: It cannot serve this run.
        """
        del opening

    # ---------------------------------------------------------------- running

    def retokenized(self, rows: Sequence[TrainingRow]) -> list[TrainingRow]:
        """Return rows as it reads them, where it has a ``tokenizer`` of its own."""
        return list(rows)

    def text_readers(self) -> Mapping[str, RowReader]:
        """Return ``retokenized`` for each loss over texts, by name; none with the run's ids."""
        return {}

    def side(self, batch: DistillBatch, quantities: Sequence[Quantity]) -> Side:
        """Return the teacher's side of a batch, at its loss positions.

        Gradient flows to the teacher's trained parameters where a quantity trains them, and nowhere
        else.

        Args:
            batch: The rows.
            quantities: Quantities that will be measured.

        Raises:
            OKDLightningError: A row or quantity that it cannot serve.
        """
        assert self.model is not None
        learns = torch.is_grad_enabled() and any(q.trains_teacher for q in quantities)
        with torch.set_grad_enabled(learns):
            return self.read(batch.teacher_reads, quantities)

    def text_side(self, batch: DistillBatch, quantities: Sequence[Quantity]) -> Side:
        """Return ``side`` for quantities over chunks of text, within ForeignTeacher."""
        return self.side(batch, quantities)

    def base_side(self, batch: DistillBatch) -> Side:
        """Return the side of the teacher without its trained parameters; a constant."""
        with torch.no_grad():
            return self.side(batch, ())

    def read(self, reads: Sequences, quantities: Sequence[Quantity] = ()) -> Side:
        """Return the side of ``model`` for some rows, with the states that quantities read."""
        assert self.model is not None
        host = self.host_weights
        with nullcontext() if host is None else host.on(reads.input_ids.device):
            return model_side(self.model, reads, self.packs, self.run.vocabulary, quantities)

    def generator(self) -> GeneratingModels:
        """Return the model that generates as the (base) teacher."""
        assert self.model is not None
        return GeneratingModels((self.model,), self.as_base())

    def generators(self) -> Sequence[GeneratingModels]:
        """Return the generating models, one entry per group of prompts; by default one for all."""
        return [self.generator()]

    def generator_of(self, prompt: Prompt) -> int:
        """Return which of ``generators`` a prompt belongs to."""
        del prompt
        return 0

    def as_base(self) -> AbstractContextManager[None]:
        """Disable its trained parameters within the block."""
        return nullcontext()

    def forms(self, terms: Sequence[WeightedTerm]) -> Sequence[WeightedTerm]:
        """Return the terms with quantities that can be measured with this teacher."""
        return terms

    def measurements(self, stage: str, is_own: bool) -> Iterator[Measurement]:
        """Yield the measurements of validation and test; see ``metrics.measures``."""
        yield self.as_base(), measures(stage, is_own, has_teacher=self.exists)

    # ---------------------------------------------------------------- training and state

    def trained_parameters(self) -> list[nn.Parameter]:
        """Return its parameters that the optimizer steps."""
        return trained(self.model)

    def after_step(self) -> None:
        """Update this teacher after an optimizer step of the student."""
        return

    def keeps(self, name: str, trained: Collection[str], frozen: Collection[str]) -> bool:
        """Return whether a checkpoint holds a weight of ``model``, as it cannot be loaded again.

        Args:
            name: The weight's name in the module, ``teacher.`` included.
            trained: Names of all trained parameters of the module.
            frozen: Names of its other parameters.
        """
        del frozen
        return name in trained or isinstance(self.source, Mapping)

    def settings(self) -> Mapping[str, Any]:
        """Return the teacher's settings for the run's record."""
        return {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copy the models, with ``memo`` deciding what they share; share everything else."""
        own = copy(self)
        memo[id(self)] = own
        own.model, own.student = deepcopy(self.model, memo), deepcopy(self.student, memo)
        return own
