"""The Pair: a student, its teacher, their vocabulary and their placement.

Owns building both and running them over batches, to measure, train and generate. It decides neither
what is trained nor by which loss, and does not know which kind of teacher it has.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from copy import copy, deepcopy
from dataclasses import replace
from typing import Any, Self, cast

import lightning
import torch
from lightning.pytorch.utilities import rank_zero_info
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel

from okd_lightning.engines.memory import memory_of
from okd_lightning.engines.tool_rollouts import ToolRounds
from okd_lightning.errors import ConfigError
from okd_lightning.losses import (
    Measured,
    Quantity,
    Side,
    WeightedLoss,
    WeightedTerm,
    fused_loss,
    measure,
    weighted_loss,
)
from okd_lightning.models import (
    DTypeName,
    EndTokens,
    GivenPair,
    ModelArgument,
    ModelSource,
    add_adapter,
    check_lengths,
    check_pair,
    compile_blocks,
    dtype_of,
    find_end_tokens,
    find_tokenizer,
    load_checked,
    load_model_config,
    packs_rows,
    recompute_activations,
    say_row_groups,
)
from okd_lightning.records.batches import DistillBatch
from okd_lightning.records.requests import Generator
from okd_lightning.sharding import Placement, WholeModels
from okd_lightning.teachers import (
    AdaptiveTeacher,
    GeneratingModels,
    OnlineModuleSettings,
    Teacher,
    TeacherBase,
    in_eval_mode,
    model_side,
    teacher_of,
    trained,
)
from okd_lightning.training.frozen_parts import own_memory
from okd_lightning.training.pair_settings import PairSettings


class Pair:
    """A student and its teacher, as one batch goes through both.

    Args:
        student: The user's student.
        teacher: The user's teacher, in any form.
        settings: How both are loaded and run.
        trainer_of: Returns the Trainer of the run that is under way; None outside of one.

    Attributes:
        student: The student's model; None before ``build``.
        tokenizer: The run's tokenizer.
        vocabulary: Ids on which both sides are compared.
        ends: Ids that end a response, one outcome for both models.
        placement: The models' placement; a sharding strategy replaces it.
        packs_student: Whether the student gets packed rows.
        teacher_base: The model with which the teacher is compared, where a method names one.
        tool_rounds: The tools of the data, where it has some.

    Raises:
        OKDLightningError: Models, tokenizer and settings do not fit together.
    """

    def __init__(
        self,
        student: ModelArgument,
        teacher: ModelArgument | Teacher | None,
        settings: PairSettings,
        trainer_of: Callable[[], lightning.Trainer | None],
    ) -> None:
        given_teacher = teacher_of(teacher)
        given_teacher.check_options(settings.teacher_options(student))
        sources = given_teacher.own_sources
        given = GivenPair.of(
            student, given_teacher.own_source, settings.student_adapter, sources[1:]
        )
        self._given = given
        self._trainer_of = trainer_of
        self.settings = settings
        self.dtype: DTypeName = dtype_of(given.student, settings.dtype)
        self.student_adapter = given.adapter
        self.tokenizer = find_tokenizer(settings.tokenizer, given.student, given.teacher)
        self.vocabulary = check_pair(self.tokenizer, given.student, sources)
        ends = find_end_tokens(
            given.student, sources, self.tokenizer, self.vocabulary, settings.end_tokens
        )
        self.student: PreTrainedModel | None = None
        self.packs_student = False
        self.placement: Placement = WholeModels()
        self.teacher_base: TeacherBase | None = None
        self.tool_rounds: ToolRounds | None = None
        run = settings.teacher_run(given, self.tokenizer, self.vocabulary)
        self.given_teacher = given_teacher.join(run)
        self.use_ends(ends)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids at which generation stops; the first ends dataset responses without an end."""
        return self.ends.stop_ids

    @property
    def student_source(self) -> ModelSource:
        """Source from which the student is loaded."""
        return self._given.student

    @property
    def adds_adapter(self) -> bool:
        """True where a new adapter is put on the student."""
        return self.student_adapter is not None and not self._given.has_adapter

    @property
    def teacher(self) -> Teacher:
        """The teacher, as it acts in the command that is under way."""
        trainer = self._trainer_of()
        return self.given_teacher.during(trainer is not None and trainer.state.fn == "fit")

    # ---------------------------------------------------------------- building

    def build(self) -> None:
        """Have both models in memory, where they are needed; called again for every command.

        Random initial weights (a student from a config, adapters) depend on the seed alone, not on
        random numbers that a strategy drew before.
        """
        with drawing_from_the_seed():
            if self.student is None:
                self._build_student()
            self.teacher.build()
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
        self.student = student
        teacher.student_loaded(student)
        if self.adds_adapter:
            add_adapter(student, cast(PeftConfig, self.student_adapter), "--model.student_adapter")
        teacher.student_adapted(student)
        if settings.gradient_checkpointing:
            recompute_activations(student, "--model.student")
        self.packs_student = packs_rows(student, settings.packing, "student")
        say_row_groups(student, "student")
        memory_of(_within_peft(student))
        if settings.compile_blocks:
            compile_blocks(student)
        own_memory(trained(student))
        student.train()
        teacher.student_ready(student, self.packs_student)

    def add_online_module(self, settings: OnlineModuleSettings) -> None:
        """Put a trainable module on the teacher; see ``DistillationModule.add_online_module``."""
        known = self.given_teacher.online_module
        if known is not None:
            if known != settings:
                raise ConfigError(
                    "two methods ask for different online modules on one teacher; give both the "
                    "same"
                )
            return
        adapted = self.given_teacher.adapted(lambda teacher: AdaptiveTeacher(teacher, settings))
        self.given_teacher = adapted.join(self.given_teacher.run)
        if self.student is not None:
            with drawing_from_the_seed():
                self.given_teacher.build()

    def add_teacher_base(self, source: ModelSource, option: str) -> None:
        """Compare the teacher with a third model; see ``DistillationModule.add_teacher_base``."""
        if self.teacher_base is not None:
            if self.teacher_base.source != source:
                raise ConfigError(
                    f"{option} {source!r} and {self.teacher_base.source!r}: the methods of a run "
                    "compare the teacher with one model; name the same one"
                )
            return
        base = TeacherBase(source, option, self.vocabulary)
        base.check(self.tokenizer)
        self.teacher_base = base

    def _check_one_base(self, base: TeacherBase) -> None:
        if self.teacher.online_module is not None:
            raise ConfigError(
                f"{base.option} names the teacher's base, and a method of this run "
                "(OKD) puts an online module on the teacher, whose base is the teacher without it; "
                "use one of both methods"
            )

    def use_ends(self, ends: EndTokens) -> None:
        """Take these ids as the ends of a response; before training, and equal on all ranks."""
        self.ends = ends
        self.vocabulary = replace(self.vocabulary, end_ids=ends.end_ids)
        self.given_teacher.use_vocabulary(self.vocabulary)

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

    def check_lengths(self, num_tokens: int, teacher_tokens: int) -> None:
        """Refuse sequences that are longer than a model's maximum.

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

    # ---------------------------------------------------------------- running

    def sides(
        self, batch: DistillBatch, quantities: Sequence[Quantity]
    ) -> tuple[Side, Side | None, Side | None]:
        """Return hidden states at unmasked positions, with heads: student, teacher, base teacher.

        Gradient flows to the teacher where a quantity trains it. The base is ``teacher_base``, or
        the teacher without its online module, for quantities that compare with it.
        """
        assert self.student is not None
        reads = batch.student_reads
        student = model_side(self.student, reads, self.packs_student, self.vocabulary)
        teacher = base = None
        if any(quantity.needs_teacher for quantity in quantities):
            teacher = self.teacher.side(batch, quantities)
            assert len(teacher.hidden) == len(student.hidden), "other loss tokens than the student"
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
        """Run both sides once and measure; see ``DistillationModule.measure``."""
        student, teacher, base = self.sides(batch, quantities)
        values = measure(
            quantities,
            student,
            teacher,
            batch.student_reads.targets,
            self.vocabulary.size,
            self.settings.tile_positions,
            base,
            Measured.about(batch).merges_ends,
        )
        if not torch.is_grad_enabled():
            self.placement.release(*self.models)
        return replace(Measured.about(batch), values=values)

    def loss_of(
        self, batch: DistillBatch, terms: Sequence[WeightedTerm], checks: bool = False
    ) -> WeightedLoss:
        """Run both sides once and sum the terms; see ``DistillationModule.loss_of``."""
        terms = self.teacher.forms(terms)
        quantities = [quantity for weighted in terms for quantity in weighted.term.quantities]
        if not all(weighted.term.is_positionwise for weighted in terms):
            return weighted_loss(terms, self.measure(batch, quantities))
        student, teacher, base = self.sides(batch, quantities)
        return fused_loss(
            terms,
            student,
            teacher,
            batch.student_reads.targets,
            Measured.about(batch),
            self.vocabulary.size,
            self.settings.tile_positions,
            base,
            checks,
        )

    @contextmanager
    def writing(self, *generators: Generator) -> Iterator[list[list[GeneratingModels]]]:
        """Prepare models for generation in the block: unsharded, in eval mode, no gradient.

        Args:
            generators: Student, teacher or both.

        Yields:
            For each, the models of its parts (``Teacher.generators``), within their PEFT wrappers,
            adapters included.
        """
        trainer = self._trainer_of()
        precision = nullcontext if trainer is None else trainer.precision_plugin.forward_context
        found = [self._generators(who) for who in generators]
        models = [model for parts in found for one in parts for model in one.models]
        plain = [
            [replace(one, models=tuple(map(_within_peft, one.models))) for one in parts]
            for parts in found
        ]
        with torch.no_grad(), precision(), self.placement.alone(*models), ExitStack() as stack:
            for one in itertools.chain(*plain):
                for context in (*map(in_eval_mode, one.models), one.context):
                    stack.enter_context(context)
            yield plain

    def _generators(self, who: Generator) -> Sequence[GeneratingModels]:
        if who != "student":
            return self.teacher.generators()
        assert self.student is not None
        return [GeneratingModels((self.student,))]

    @property
    def models(self) -> list[PreTrainedModel]:
        """All models in memory, each of which is placed by itself: student, then teachers."""
        return [*([] if self.student is None else [self.student]), *self.teacher.models]

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copy the models, with ``memo`` deciding what they share; share everything else.

        Models that were given in memory and are not in use yet are copied too: else the copies
        would train one object.
        """
        own = copy(self)
        memo[id(self)] = own
        own.student = deepcopy(self.student, memo)
        own.given_teacher = deepcopy(self.given_teacher, memo)
        own._trainer_of = deepcopy(self._trainer_of, memo)
        if self.student is None:
            own._given = deepcopy(self._given, memo)
        return own


def _within_peft(model: PreTrainedModel) -> PreTrainedModel:
    return model.get_base_model() if isinstance(model, PeftModel) else model


@contextmanager
def drawing_from_the_seed() -> Iterator[None]:
    """Make random weights depend on the seed alone, not on earlier random numbers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch.initial_seed())
        yield
