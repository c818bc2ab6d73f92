"""The Pair: a student, its teacher, their vocabulary and their placement on devices.

Owns building both and running them over batches, to measure, train and generate. It does not own
the choice of trained parameters or of the loss, and treats all kinds of teacher alike.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy, deepcopy
from dataclasses import replace
from functools import partial
from typing import Any, Self, cast

import lightning
import torch
from lightning.pytorch.utilities import rank_zero_info
from peft import PeftConfig
from torch import nn
from transformers import PreTrainedModel

from okd_lightning.engines import Sampling
from okd_lightning.engines.engine import EngineSource
from okd_lightning.engines.tool_rollouts import ToolRounds
from okd_lightning.errors import ConfigError
from okd_lightning.losses import (
    Measured,
    Quantity,
    Side,
    WeightedLoss,
    WeightedTerm,
)
from okd_lightning.losses.fused import batch_loss, measure_batch
from okd_lightning.losses.states import loss_with_states
from okd_lightning.models import (
    DTypeName,
    EndTokens,
    GivenPair,
    LayerPair,
    ModelArgument,
    ModelSource,
    Projectors,
    add_adapter,
    check_lengths,
    check_pair,
    dtype_of,
    find_end_tokens,
    find_images,
    find_tokenizer,
    load_checked,
    load_model_config,
    projectors_for,
)
from okd_lightning.models.adapters import model_source
from okd_lightning.records.batches import DistillBatch
from okd_lightning.sharding import Placement
from okd_lightning.teachers import (
    AdaptiveTeacher,
    OnlineModuleSettings,
    Teacher,
    TeacherBase,
    model_side,
    teacher_of,
)
from okd_lightning.training.pair_settings import PairSettings, drawing_from_the_seed, images_refused


class Pair:
    """A student and its teacher, as one batch goes through both.

    Args:
        student: The user's student.
        teacher: The user's teacher, in any form.
        settings: Settings for loading and running both models.
        trainer_of: Returns the Trainer of the current run; None outside of one.
        engine: Source of the engine for the student's responses; None for the built-in engine.

    Attributes:
        student: The student's model; None before ``build``.
        tokenizer: The run's tokenizer.
        teacher: The teacher that is used in the current command.
        vocabulary: Ids on which both sides are compared.
        ends: Ids that end a response, one outcome for both models.
        placement: How to run models in shards, set by the strategy; None for whole models.
        packs_student: Whether the student gets packed rows.
        teacher_base: The model with which the teacher is compared, where a method names one.
        tool_rounds: The tools of the data, where it has some.
        layer_pairs: Pairs of layers whose hidden states methods compare.
        projectors: Maps of the student's states to the teacher's widths, where these differ.
        images: The processors of both models.
        settle: Waits for rollouts ahead of training, where the engine cannot do both; collective.

    Raises:
        OKDLightningError: Models, tokenizer and settings do not fit together.
    """

    def __init__(
        self,
        student: ModelArgument,
        teacher: ModelArgument | Teacher | None,
        settings: PairSettings,
        trainer_of: Callable[[], lightning.Trainer | None],
        engine: EngineSource | None = None,
    ) -> None:
        own = partial(find_tokenizer, settings.tokenizer, model_source(student, "student"), None)
        given_teacher = teacher_of(teacher).for_student(own)
        given_teacher.check_options(settings.teacher_options(student))
        sources = given_teacher.own_sources
        given = GivenPair.of(
            student, given_teacher.own_source, settings.student_adapter, sources[1:]
        )
        self._given = given
        self.trainer_of = trainer_of
        self.engine = engine
        self.settings = settings
        self.dtype: DTypeName = dtype_of(given.student, settings.dtype)
        self.student_adapter = given.adapter
        self.tokenizer = find_tokenizer(settings.tokenizer, given.student, given.teacher)
        self.vocabulary = check_pair(self.tokenizer, given.student, sources)
        unread = images_refused(given_teacher, engine)
        self.images = find_images(self.tokenizer, given.student, sources, unread)
        ends = find_end_tokens(
            given.student, sources, self.tokenizer, self.vocabulary, settings.end_tokens
        )
        self.student: PreTrainedModel | None = None
        self.packs_student = False
        self.placement: Placement | None = None
        self.teacher_base: TeacherBase | None = None
        self.tool_rounds: ToolRounds | None = None
        self.layer_pairs: tuple[LayerPair, ...] = ()
        self.projectors: Projectors | None = None
        self.settle: Callable[[], None] | None = None
        run = settings.teacher_run(given, self.tokenizer, self.vocabulary)
        self.teacher = self.given_teacher = given_teacher.join(run)
        self.begin()
        self.use_ends(ends)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids at which generation stops; the first ends dataset responses without an end."""
        return self.ends.stop_ids

    @property
    def models(self) -> list[PreTrainedModel]:
        """All models in memory, each of which is placed by itself: student, then teachers."""
        return [*([] if self.student is None else [self.student]), *self.teacher.models]

    @property
    def models_read(self) -> list[PreTrainedModel | None]:
        """``models``, and the teacher's base where a method compares with it."""
        base = self.teacher_base
        return [*self.models, None if base is None else base.model]

    @property
    def student_source(self) -> ModelSource:
        """Source from which the student is loaded."""
        return self._given.student

    @property
    def adds_adapter(self) -> bool:
        """True where a new adapter is put on the student."""
        return self.student_adapter is not None and not self._given.has_adapter

    # ---------------------------------------------------------------- building

    def begin(self) -> None:
        """Choose the teacher for the command that begins: a training run, or another one."""
        trainer = self.trainer_of()
        is_training = trainer is not None and trainer.state.fn == "fit"
        self.teacher = self.given_teacher.during(is_training)

    def build(self) -> None:
        """Load both models where they are needed; called again for every command.

        Random initial weights (a student from a config, adapters) depend on the seed alone, not on
        random numbers that a strategy drew before.
        """
        with drawing_from_the_seed():
            if self.student is None:
                self._build_student()
            self.teacher.build()
            if self.layer_pairs:
                sides = self.student, self.teacher.model
                self.projectors = projectors_for(self.layer_pairs, *sides, self.projectors)
        if self.teacher_base is not None:
            self._check_one_base(self.teacher_base)
            run = self.given_teacher.run
            self.teacher_base.load(run.dtype, run.attn_implementation, run.packing)

    def _build_student(self) -> None:
        settings, teacher = self.settings, self.given_teacher
        student = load_checked(
            self.student_source,
            "--model.student",
            self.vocabulary.size,
            dtype=self.dtype,
            attn_implementation=settings.attn_implementation,
            learns="all" if self.student_adapter is None else "adapter",
        )
        self.student = settings.frozen(student)
        teacher.student_loaded(student)
        if self.adds_adapter:
            adapter, on_vision = cast(PeftConfig, self.student_adapter), not settings.freeze_vision
            add_adapter(student, adapter, "--model.student_adapter", adapts_vision=on_vision)
        teacher.student_adapted(student)
        self.packs_student = settings.prepare(student)
        teacher.student_ready(student, self.packs_student)

    def add_online_module(self, settings: OnlineModuleSettings) -> None:
        """Put a trainable module on the teacher.

        Raises:
            ConfigError: A teacher that cannot have one, or two methods that need different modules.
        """
        known = self.given_teacher.online_module
        if known is not None:
            if known != settings:
                raise ConfigError(
                    "two methods need different online modules on one teacher; give both the same"
                )
            return
        adapted = self.given_teacher.adapted(lambda teacher: AdaptiveTeacher(teacher, settings))
        self.given_teacher = adapted.join(self.given_teacher.run)
        self.begin()
        if self.student is not None:
            with drawing_from_the_seed():
                self.given_teacher.build()

    def add_teacher_base(self, source: ModelSource, option: str) -> None:
        """Compare the teacher with another frozen model, which is in no checkpoint, for one run.

        Quantities with ``needs_base_teacher`` read it then, in the teacher's number format.

        Args:
            source: Folder or hub id, such as that of the teacher before its post-training.
            option: How the user named it, for messages, such as ``--method.teacher_base``.

        Raises:
            ConfigError: Another method of the run compares with another model.
            ModelError, VocabularyError: It cannot be read, or has other ids.
        """
        run = self.vocabulary, self.tokenizer, self.given_teacher.tokenizer is not None
        self.teacher_base = TeacherBase.joining(self.teacher_base, source, option, *run)

    def _check_one_base(self, base: TeacherBase) -> None:
        if self.teacher.online_module is not None:
            raise ConfigError(
                f"{base.option} names the teacher's base, and a method of this run "
                "(OKD) puts an online module on the teacher, whose base is the teacher without it; "
                "use one of both methods"
            )

    def use_images(self) -> None:
        """Mask the ids of images; refuse images that a model of the run cannot read."""
        self.images.check(has_tools=self.tool_rounds is not None)
        self.vocabulary = self.vocabulary.without(self.images.mask_ids)
        self.given_teacher.use_vocabulary(self.vocabulary)

    def use_ends(self, ends: EndTokens) -> None:
        """Set the ids that end a response; before training, and equal on all ranks."""
        self.ends = ends
        self.vocabulary = replace(self.vocabulary, end_ids=ends.end_ids)
        self.given_teacher.use_vocabulary(self.vocabulary)

    def keep_apart(self, ids: Collection[int]) -> None:
        """Take ids after which a response goes on out of the ends; logged once."""
        ends = self.ends.without(ids)
        if ends.end_ids != self.ends.end_ids:
            names = ", ".join(repr(self.tokenizer.decode([i])) for i in ids)
            rank_zero_info(f"a response goes on after {names}, so it does not end the response")
        self.use_ends(ends)

    def add_eos_ids(self, ids: Iterable[int]) -> None:
        """Add ids that end a response, such as a chat template's end of turn; logged once."""
        found = list(ids)
        new = [i for i in found if i not in self.eos_ids]
        has_own = self.given_teacher.tokenizer is not None
        self.use_ends(self.ends.with_stops(found, are_ends=has_own))
        if new:
            names = ", ".join(repr(self.tokenizer.decode([i])) for i in new)
            rank_zero_info(f"responses also end at {names}, as the data's own responses do")

    def check_lengths(self, num_tokens: int, teacher_tokens: int) -> None:
        """Refuse sequences that are longer than a model's maximum.

        Args:
            num_tokens: The longest that the student reads.
            teacher_tokens: The longest that the teacher reads.

        Raises:
            ConfigError: A sequence is too long; the message names the model and both lengths.
        """
        size = self.vocabulary.size  # neither model may be loaded yet, the teacher maybe never
        student = load_model_config(self.student or self.student_source, "--model.student", size)
        teacher = self.teacher
        check_lengths(student, teacher.config(student), num_tokens, teacher_tokens)
        if self.teacher_base is not None:
            self.teacher_base.check_length(teacher_tokens)
        teacher.check_length(teacher_tokens)
        if self.engine is not None:
            self.engine.check_length(num_tokens)

    def check_sampling(self, sampling: Sampling) -> None:
        """Refuse, before training, sampling settings that the student's engine does not support.

        Raises:
            ConfigError: The engine does not support them; the message names what it does support.
        """
        if self.engine is not None:
            self.engine.check_sampling(sampling)

    # ---------------------------------------------------------------- running

    def alone(self, *models: nn.Module | None) -> AbstractContextManager[object]:
        """Return a context in which ranks run the models any number of times; see Placement."""
        return nullcontext() if self.placement is None else self.placement.alone(*models)

    def sides(
        self, batch: DistillBatch, quantities: Sequence[Quantity]
    ) -> tuple[Side, Side | None, Side | None]:
        """Return hidden states at unmasked positions, with heads: student, teacher, base teacher.

        Gradient flows to the teacher where a quantity trains it. The base is ``teacher_base``, or
        the teacher without its online module, for quantities that compare with it.
        """
        assert self.student is not None
        batch = self.images.with_inputs(batch) if batch.images or batch.teacher_images else batch
        own = (self.student, batch.student_reads, self.packs_student, self.vocabulary)
        student = model_side(*own, quantities, "student")
        teacher = base = None
        if any(quantity.needs_teacher for quantity in quantities):
            teacher = self.teacher.side(batch, quantities)
            is_same = batch.chunks is not None or len(teacher.hidden) == len(student.hidden)
            assert is_same, "other loss tokens than the student"
        if any(quantity.needs_base_teacher for quantity in quantities):
            base = self._base_side(batch)
        return student, teacher, base

    def _base_side(self, batch: DistillBatch) -> Side:
        own, read = self.teacher_base, batch.teacher_reads
        if own is None:
            return self.teacher.base_side(batch)
        with torch.no_grad():
            return model_side(own.on(read.input_ids.device), read, own.packs, self.vocabulary)

    def measure(self, batch: DistillBatch, quantities: Sequence[Quantity]) -> Measured:
        """Run both sides once over a batch and measure at its unmasked positions.

        The student runs in the caller's gradient mode. The teacher reads its own prompts where the
        batch has them; the positions are those of the same response tokens on both sides.
        """
        rows = self.sides(batch, quantities), batch, batch.student_reads.targets
        sizes = self.vocabulary.size, self.settings.tile_positions
        measured = measure_batch(quantities, *rows, Measured.about(batch), *sizes)
        if self.placement is not None and not torch.is_grad_enabled():
            self.placement.release(*self.models)
        return measured

    def loss_of(
        self, batch: DistillBatch, terms: Sequence[WeightedTerm], checks: bool = False
    ) -> WeightedLoss:
        """Run both sides once over a batch and sum the weighted terms, which decide the gradient.

        The sum is computed tile by tile where all terms are positionwise, which ``checks`` tests.
        """
        terms = self.teacher.forms(terms)
        quantities = [quantity for weighted in terms for quantity in weighted.term.quantities]
        rows = self.sides(batch, quantities), batch, batch.student_reads.targets
        sizes = self.vocabulary.size, self.settings.tile_positions
        given = terms, *rows, Measured.about(batch), *sizes, checks
        if any(weighted.term.reads_states for weighted in terms):
            return loss_with_states(*given, self.projectors)
        return batch_loss(*given)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copy the models, with ``memo`` deciding what they share; share everything else.

        Models that were given in memory and are not in use yet are copied too; otherwise the copies
        would train one object.
        """
        own = copy(self)
        memo[id(self)] = own
        own.student = deepcopy(self.student, memo)
        own.projectors = deepcopy(self.projectors, memo)
        own.given_teacher = deepcopy(self.given_teacher, memo)
        own.teacher = deepcopy(self.teacher, memo)
        own.trainer_of = deepcopy(self.trainer_of, memo)
        if self.student is None:
            own._given = deepcopy(self._given, memo)
        return own
