"""The PairRuns: both models of a module run over batches, to measure, train and generate.

Does not build them: that is ``pair_module``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from lightning.pytorch.utilities import rank_zero_info
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from okd_lightning.engines import RolloutEngine, Sampling, TransformersEngine
from okd_lightning.engines.engine import EngineSource
from okd_lightning.engines.tool_rollouts import ToolEngine, ToolRounds
from okd_lightning.losses import (
    Measured,
    Quantity,
    WeightedLoss,
    WeightedTerm,
    fused_loss,
    measure,
    weighted_loss,
)
from okd_lightning.models import (
    EndTokens,
    ModelSource,
    Vocabulary,
    check_lengths,
    load_model_config,
)
from okd_lightning.records.batches import DistillBatch
from okd_lightning.records.requests import Generator, Request, Rollout
from okd_lightning.sharding import Placement
from okd_lightning.teachers import (
    CachedTeacher,
    SelfTeacher,
    ServedTeacher,
    TeacherBase,
    cached_terms,
)
from okd_lightning.training.frozen_parts import FrozenPartsModule
from okd_lightning.training.pair_sides import PairSides


class PairRuns(FrozenPartsModule):
    """Methods of a PairModule that run its models; see there for the attributes."""

    student: PreTrainedModel | None
    teacher: PreTrainedModel | None
    self_teacher: SelfTeacher | None
    tokenizer: PreTrainedTokenizerBase
    vocabulary: Vocabulary
    ends: EndTokens
    tile_positions: int | None
    packs_student: bool
    packs_teacher: bool
    engine: EngineSource | None
    tool_rounds: ToolRounds | None
    placement: Placement
    teacher_base: TeacherBase | None
    cached_teacher: CachedTeacher | None
    served_teacher: ServedTeacher | None
    _has_online_module: bool

    @property
    @abstractmethod
    def student_source(self) -> ModelSource:
        """Source from which the student is loaded."""

    @property
    @abstractmethod
    def teacher_source(self) -> ModelSource | None:
        """Source from which the teacher is loaded; None without one."""

    @property
    @abstractmethod
    def cache_in_use(self) -> CachedTeacher | ServedTeacher | None:
        """Replacement of a teacher in memory, if there is one."""

    def as_base_teacher(self) -> AbstractContextManager[None]:
        """Disable the teacher's online module within the block, which gives the base teacher."""
        return self.sides.as_base_teacher()

    def measure(self, batch: DistillBatch, quantities: Sequence[Quantity]) -> Measured:
        """Run the models once over a batch and measure at its unmasked positions.

        The student runs in the caller's gradient mode; the teacher runs without gradient, except
        where a quantity trains its online module. Where a quantity compares with the base, that
        runs as well: ``teacher_base``, or the teacher a second time without its online module. The
        teacher reads its own prompts where the batch has them; the positions are those of the same
        response tokens on both sides.
        """
        student, teacher, base = self.sides.of(batch, quantities)
        values = measure(
            quantities,
            student,
            teacher,
            batch.student_reads.targets,
            self.vocabulary.size,
            self.tile_positions,
            base,
            Measured.about(batch).merges_ends,
        )
        if not torch.is_grad_enabled():
            self.placement.release(self.student, self.teacher)
        return replace(Measured.about(batch), values=values)

    def loss_of(
        self, batch: DistillBatch, terms: Sequence[WeightedTerm], checks: bool = False
    ) -> WeightedLoss:
        """Run the models once over a batch and sum the weighted terms, which decide the gradient.

        The sum is computed tile by tile where all terms are positionwise; ``checks`` verifies that
        they are.
        """
        if self.cache_in_use is not None:
            terms = cached_terms(terms, self.cache_in_use.k, self.vocabulary.size)
        quantities = [quantity for weighted in terms for quantity in weighted.term.quantities]
        if not all(weighted.term.is_positionwise for weighted in terms):
            return weighted_loss(terms, self.measure(batch, quantities))
        student, teacher, base = self.sides.of(batch, quantities)
        return fused_loss(
            terms,
            student,
            teacher,
            batch.student_reads.targets,
            Measured.about(batch),
            self.vocabulary.size,
            self.tile_positions,
            base,
            checks,
        )

    @property
    def sides(self) -> PairSides:
        """Both models as inputs of the loss layer."""
        assert self.student is not None
        return PairSides(
            student=self.student,
            teacher=self.teacher,
            vocabulary=self.vocabulary,
            self_teacher=self.self_teacher,
            packs=(self.packs_student, self.packs_teacher),
            has_online_module=self._has_online_module,
            absent=self.cache_in_use,
            teacher_base=self.teacher_base,
        )

    def respond(self, request: Request) -> Rollout:
        """Generate responses with the student or the teacher, in eval mode and without gradient.

        Where the data has tools (``tool_rounds``), prompts that are chats may call them.
        """
        with self.writing(request.generator) as (model,):
            if request.generator == "student" and self.engine is not None:
                engine = self.engine.engine(model, self.vocabulary, self.eos_ids)
            else:
                engine = self.build_engine(model)
            if self.tool_rounds is not None:
                engine = ToolEngine(engine, self.tool_rounds)
            return engine.respond(request)

    def writing(self, *generators: Generator) -> AbstractContextManager[list[PreTrainedModel]]:
        """Prepare the models for generation in the block; see ``PairSides.writing``."""
        precision = self._trainer.precision_plugin.forward_context if self._trainer else nullcontext
        return self.sides.writing(generators, self.placement, precision())

    def build_engine(self, model: PreTrainedModel) -> RolloutEngine:
        """Build the built-in engine on ``model``; override to use another for both models."""
        return TransformersEngine(model, self.vocabulary, self.eos_ids)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids at which generation stops; the first ends dataset responses without an end."""
        return self.ends.stop_ids

    def use_ends(self, ends: EndTokens) -> None:
        """Take these ids as the ends of a response; before training, and equal on all ranks."""
        self.ends = ends
        self.vocabulary = replace(self.vocabulary, end_ids=ends.end_ids)
        for absent in (self.cached_teacher, self.served_teacher):
            if absent is not None:
                absent.vocabulary = self.vocabulary

    def keep_apart(self, ids: Collection[int]) -> None:
        """Take ids after which a response goes on out of the ends; logged once."""
        ends = self.ends.without(ids)
        if ends.end_ids != self.ends.end_ids:
            names = ", ".join(repr(self.tokenizer.decode([i])) for i in ids)
            rank_zero_info(f"a response goes on after {names}, so it is no end of it")
        self.use_ends(ends)

    def add_eos_ids(self, ids: Iterable[int]) -> None:
        """Let further ids end a response, such as a chat template's end of turn; logged once."""
        found = list(ids)
        new = [i for i in found if i not in self.eos_ids]
        self.use_ends(self.ends.with_stops(found))
        if new:
            names = ", ".join(repr(self.tokenizer.decode([i])) for i in new)
            rank_zero_info(f"responses also end at {names}, as the data's own responses do")

    def check_lengths(self, num_tokens: int, teacher_tokens: int | None = None) -> None:
        """Refuse sequences that are longer than a model's maximum.

        Args:
            num_tokens: The longest that the student reads.
            teacher_tokens: The longest that the teacher reads; None for ``num_tokens``.

        Raises:
            ConfigError: A sequence is too long; the message names the model and both lengths.
        """
        size = self.vocabulary.size  # neither model may be loaded yet, the teacher maybe never
        student = load_model_config(self.student or self.student_source, "--model.student", size)
        teacher = None if self.self_teacher is None else student
        if self.self_teacher is None and self.teacher_source is not None:
            teacher = load_model_config(self.teacher_source, "--model.teacher", size)
        check_lengths(student, teacher, num_tokens, teacher_tokens or num_tokens)
        if self.teacher_base is not None:
            self.teacher_base.check_length(teacher_tokens or num_tokens)
        if self.engine is not None:
            self.engine.check_length(num_tokens)
        if isinstance(self.cache_in_use, ServedTeacher):
            self.cache_in_use.check_length(teacher_tokens or num_tokens)

    def check_sampling(self, sampling: Sampling) -> None:
        """Refuse, before training, sampling settings that the student's engine does not support.

        Raises:
            ConfigError: The engine does not support them; the message names what it does support.
        """
        if self.engine is not None:
            self.engine.check_sampling(sampling)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of some ids, without special tokens."""
        return str(
            self.tokenizer.decode(
                list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )
