"""Both models run over a batch: each half of the loss layer, and who speaks as the teacher."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Protocol, cast

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from okd_lightning.losses import Quantity, Side
from okd_lightning.models import (
    LMHead,
    SelfTeacher,
    TeacherBase,
    Vocabulary,
    WithinContext,
    base_teacher,
    detached,
    hidden_at_loss,
    in_eval_mode,
    packs_rows,
    say_row_groups,
)
from okd_lightning.records import DistillBatch
from okd_lightning.rollouts.engine import Author
from okd_lightning.rollouts.memory import memory_of
from okd_lightning.sequences import Sequences
from okd_lightning.sharding import Placement


def tried_model(model: PreTrainedModel, packing: bool, role: Author) -> bool:
    """Try how a model of the run reads rows, and how the student generates; say what is slower.

    Args:
        model: On its device, or on meta, where nothing can be tried yet.
        packing: Whether the run packs rows.
        role: Which of the two.

    Returns:
        Whether the model gets packed rows.
    """
    packs = packs_rows(model, packing, role)
    say_row_groups(model, role)
    if role == "student":  # a teacher that generates is tried when it begins to
        memory_of(model.get_base_model() if isinstance(model, PeftModel) else model)
    return packs


class AbsentTeacher(Protocol):
    """Knows what a teacher that is not in memory has to say."""

    def side(self, batch: DistillBatch, quantities: Sequence[Quantity]) -> Side:
        """The teacher's half for a batch."""


@dataclass(frozen=True)
class PairSides:
    """A student and whoever teaches it.

    Attributes:
        student: In the mode and with the gradients of the caller.
        teacher: In eval mode; None where the student teaches itself, or nobody does.
        vocabulary: What both heads are cut to.
        self_teacher: How the student teaches itself, if it does.
        packs: Whether student and teacher get packed rows.
        has_online_module: Whether the teacher carries one.
        absent: What stands for a teacher that is not in memory.
        teacher_base: The model that the teacher is compared with, in place of the teacher without
            its online module.
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
        """Hidden states at the masked-in positions, with heads: student, teacher, base teacher.

        The teacher learns where a quantity trains it; the base is ``teacher_base``, or the teacher
        without its online module, for quantities that compare with it.
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
        """One model's half for some rows."""
        return self._half(model, read, self.packs[0] if model is self.student else self.packs[1])

    def _half(self, model: PreTrainedModel, read: Sequences, packs: bool) -> Side:
        hidden = hidden_at_loss(model, read, packs)
        return Side(hidden=hidden, head=LMHead.of(model, self.vocabulary))

    def speaking(self, author: Author) -> tuple[PreTrainedModel, AbstractContextManager[None]]:
        """The model that writes as one of the two, and what it has to be wrapped in meanwhile."""
        if author == "student":
            return self.student, nullcontext()
        if self.teacher is not None:
            return self.teacher, self.as_base_teacher()
        return self.student, self._student_as_teacher()

    @contextmanager
    def writing(
        self,
        authors: Sequence[Author],
        placement: Placement,
        precision: AbstractContextManager[None],
    ) -> Iterator[list[PreTrainedModel]]:
        """Within it models can write: in one piece, in eval mode and without gradient.

        Args:
            authors: Whose models.
            placement: Where they are.
            precision: The number formats that the run computes in.

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
        """Within it the teacher is the base one, without its online module."""
        if self.teacher is None or not self.has_online_module:
            return nullcontext()
        return base_teacher(self.teacher)

    def _teacher_side(self, read: Sequences, learns: bool) -> Side:
        """The teacher's half; where the student teaches itself, no gradient goes through it."""
        if self.teacher is not None:
            with torch.set_grad_enabled(learns):
                return self.side(self.teacher, read)
        with torch.no_grad(), self._student_as_teacher():
            side = self.side(self.student, read)
            head = LMHead.of(self.student, self.vocabulary)
            return replace(side, head=replace(head, module=detached(head.module)))

    @contextmanager
    def _student_as_teacher(self) -> Iterator[None]:
        """The student in eval mode; as a frozen teacher without its adapter."""
        assert self.self_teacher is not None
        adapter = base_teacher(self.student) if self.self_teacher == "frozen" else nullcontext()
        with in_eval_mode(self.student), adapter:
            yield

    def _base_side(self, read: Sequences) -> Side:
        """The base's half: another model, or the teacher without its online module.

        The online module may sit on the head as well.
        """
        if self.teacher_base is not None:
            with torch.no_grad():
                model = self.teacher_base.on(read.input_ids.device)
                return self._half(model, read, self.teacher_base.packs)
        with self.as_base_teacher():
            side = self._teacher_side(read, learns=False)
        assert isinstance(side.head, LMHead)
        within = WithinContext(side.head.module, self.as_base_teacher)
        return replace(side, head=replace(side.head, module=within))
