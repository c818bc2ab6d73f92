"""Both models run over a batch: the inputs of the loss layer, and which model is the teacher."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Protocol, cast

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from okd_lightning.engines.memory import memory_of
from okd_lightning.losses import Quantity, Side
from okd_lightning.models import (
    LMHead,
    Vocabulary,
    hidden_at_loss,
    packs_rows,
    say_row_groups,
)
from okd_lightning.records.batches import DistillBatch
from okd_lightning.records.requests import Generator
from okd_lightning.records.sequences import Sequences
from okd_lightning.sharding import Placement
from okd_lightning.teachers import (
    SelfTeacher,
    TeacherBase,
    WithinContext,
    base_teacher,
    detached,
    in_eval_mode,
)


def tried_model(model: PreTrainedModel, packing: bool, role: Generator) -> bool:
    """Test how a model reads rows and, for the student, generates; report slow fallbacks.

    Args:
        model: A model on its device, or on meta, where nothing can be tested yet.
        packing: Whether the run packs rows.
        role: Student or teacher.

    Returns:
        Whether the model gets packed rows.
    """
    packs = packs_rows(model, packing, role)
    say_row_groups(model, role)
    if role == "student":  # a generating teacher is tested when it starts
        memory_of(model.get_base_model() if isinstance(model, PeftModel) else model)
    return packs


class AbsentTeacher(Protocol):
    """Replacement of a teacher that is not in memory."""

    def side(self, batch: DistillBatch, quantities: Sequence[Quantity]) -> Side:
        """Return the teacher's side for a batch."""


@dataclass(frozen=True)
class PairSides:
    """A student and its teacher.

    Attributes:
        student: Student, in the mode and with the gradients of the caller.
        teacher: Teacher in eval mode; None without one, or for a self-teacher that is no copy.
        vocabulary: Vocabulary to which both heads are cut.
        self_teacher: How the student teaches itself, if it does.
        packs: Whether student and teacher get packed rows.
        has_online_module: Whether the teacher has one.
        absent: Replacement of a teacher that is not in memory.
        teacher_base: Model with which the teacher is compared, instead of the teacher without its
            online module.
    """

    student: PreTrainedModel
    teacher: PreTrainedModel | None
    vocabulary: Vocabulary
    self_teacher: SelfTeacher | None
    packs: tuple[bool, bool]
    has_online_module: bool
    absent: AbsentTeacher | None
    teacher_base: TeacherBase | None = None

    def of(
        self, batch: DistillBatch, quantities: Sequence[Quantity]
    ) -> tuple[Side, Side | None, Side | None]:
        """Return hidden states at unmasked positions, with heads: student, teacher, base teacher.

        Gradient flows to the teacher where a quantity trains it. The base is ``teacher_base``, or
        the teacher without its online module, for quantities that compare with it.
        """
        student = self.side(self.student, batch.student_reads)
        teacher = base = None
        if any(quantity.needs_teacher for quantity in quantities):
            learns = torch.is_grad_enabled() and any(q.trains_teacher for q in quantities)
            if self.absent is not None:
                teacher = self.absent.side(batch, quantities)
            else:
                teacher = self._teacher_side(batch.teacher_reads, learns)
            assert len(teacher.hidden) == len(student.hidden), "other loss tokens than the student"
        if any(quantity.needs_base_teacher for quantity in quantities):
            base = self._base_side(batch.teacher_reads)
        return student, teacher, base

    def side(self, model: PreTrainedModel, read: Sequences) -> Side:
        """Return one model's side for some rows."""
        return self._one_side(
            model, read, self.packs[0] if model is self.student else self.packs[1]
        )

    def _one_side(self, model: PreTrainedModel, read: Sequences, packs: bool) -> Side:
        hidden = hidden_at_loss(model, read, packs)
        head = LMHead.of(model, self.vocabulary)
        return Side(hidden=hidden, head=head, end_ids=self.vocabulary.end_ids)

    def speaking(self, author: Generator) -> tuple[PreTrainedModel, AbstractContextManager[None]]:
        """Return the model that generates as student or teacher, and the context that it needs."""
        if author == "student":
            return self.student, nullcontext()
        if self.teacher is not None:
            return self.teacher, self.as_base_teacher()
        return self.student, self._student_as_teacher()

    @contextmanager
    def writing(
        self,
        authors: Sequence[Generator],
        placement: Placement,
        precision: AbstractContextManager[None],
    ) -> Iterator[list[PreTrainedModel]]:
        """Prepare models for generation in the block: unsharded, in eval mode, no gradient.

        Args:
            authors: Student, teacher or both.
            placement: Placement of the models.
            precision: The number formats of the run's computation.

        Yields:
            Each author's model within its PEFT wrapper, adapters included.
        """
        models, contexts = zip(*map(self.speaking, authors), strict=True)
        plain = [m.get_base_model() if isinstance(m, PeftModel) else m for m in models]
        with torch.no_grad(), precision, placement.alone(*models), ExitStack() as stack:
            for context in (*map(in_eval_mode, plain), *contexts):
                stack.enter_context(context)
            yield cast(list[PreTrainedModel], plain)

    def as_base_teacher(self) -> AbstractContextManager[None]:
        """Disable the teacher's online module within the block, which gives the base teacher."""
        if self.teacher is None or not self.has_online_module:
            return nullcontext()
        return base_teacher(self.teacher)

    def _teacher_side(self, read: Sequences, learns: bool) -> Side:
        """Return the teacher's side; no gradient flows through a self-teacher."""
        if self.teacher is not None:
            with torch.set_grad_enabled(learns):
                return self.side(self.teacher, read)
        with torch.no_grad(), self._student_as_teacher():
            side = self.side(self.student, read)
            head = LMHead.of(self.student, self.vocabulary)
            return replace(side, head=replace(head, module=detached(head.module)))

    @contextmanager
    def _student_as_teacher(self) -> Iterator[None]:
        """Put the student into eval mode; as a frozen teacher without its adapter."""
        assert self.self_teacher is not None
        adapter = base_teacher(self.student) if self.self_teacher == "frozen" else nullcontext()
        with in_eval_mode(self.student), adapter:
            yield

    def _base_side(self, read: Sequences) -> Side:
        """Return the base's side: another model, or the teacher without its online module.

        The online module may be on the head as well.
        """
        if self.teacher_base is not None:
            with torch.no_grad():
                model = self.teacher_base.on(read.input_ids.device)
                return self._one_side(model, read, self.teacher_base.packs)
        with self.as_base_teacher():
            side = self._teacher_side(read, learns=False)
        assert isinstance(side.head, LMHead)
        within = WithinContext(side.head.module, self.as_base_teacher)
        return replace(side, head=replace(side.head, module=within))
