"""The RoutedTeachers: one of several teachers for each row, which a column of the data names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias, final

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from okd_lightning.errors import ConfigError
from okd_lightning.losses import Quantity, Side, Term, WeightedTerm, routed_side
from okd_lightning.models import ModelArgument
from okd_lightning.records.batches import DistillBatch
from okd_lightning.records.requests import Prompt
from okd_lightning.teachers.base import Measurement, Teacher
from okd_lightning.teachers.loaded import LoadedTeacher, teacher_of
from okd_lightning.teachers.packed import PackedTeacher
from okd_lightning.teachers.run import GeneratingModels, TeacherOptions
from okd_lightning.teachers.several import SeveralTeachers, argument_of, name_of

_Read: TypeAlias = Callable[[Teacher, DistillBatch], Side]


@final
class RoutedTeachers(SeveralTeachers):
    """A teacher for each row, named by the column data.teacher_column.

    Each teacher reads its own rows only. Names of one checkpoint share one model and one pass. The
    loss is divided once, by the tokens of the whole optimizer step. Each term is also logged by
    teacher (train/TERM/TEACHER), as are its tokens (train/tokens/TEACHER) and validation's measures
    (val/MEASURE/TEACHER). OKD puts an online module on every model.

    Args:
        teachers: Name to model, in the forms of LoadedTeacher, over one vocabulary; or name to
            ServedTeacher, all of one k.

    Raises:
        ConfigError: No teachers, one of another kind, teachers in memory next to served ones, or a
            name without letters.
    """

    def __init__(self, teachers: dict[str, Teacher | ModelArgument]) -> None:
        named = {_checked_name(name): one for name, one in teachers.items()}
        self._given = {name: teacher_of(one) for name, one in sorted(named.items())}
        distinct: dict[object, Teacher] = {}
        for one in self._given.values():
            distinct.setdefault(_key(one), one)
        self._places = tuple(list(distinct).index(_key(one)) for one in self._given.values())
        super().__init__(list(distinct.values()))
        _check_one_form(self.members)
        first = self.members[0]
        self.reads_images, self.covers_vocabulary = first.reads_images, first.covers_vocabulary

    def check_member(self, member: Teacher) -> None:
        """Refuse a teacher that reads no new rows over the run's tokens."""
        is_served = isinstance(member, PackedTeacher) and member.reads_new_rows
        if not is_served and (member.own_source is None or not member.covers_vocabulary):
            raise ConfigError(
                f"RoutedTeachers holds a {type(member).__name__}, and its teachers are models in "
                "this process or on servers, over the run's tokens: give folders or hub ids, or a "
                "ServedTeacher for each name"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """The teachers' names, in alphabetical order, by which rows have their numbers."""
        return tuple(self._given)

    @property
    def arguments(self) -> Mapping[str, Any]:
        """The models by name."""
        return {"teachers": {name: argument_of(one) for name, one in self._given.items()}}

    @property
    def mark(self) -> str:
        """The models by name: a run resumes with the same."""
        shown = (f"{name}: {name_of(one)}" for name, one in self._given.items())
        return f"RoutedTeachers ({', '.join(shown)})"

    def check_options(self, options: TeacherOptions) -> None:
        """Check them for all members."""
        for member in self.members:
            member.check_options(options)

    def check_term(self, term: Term) -> None:
        """Refuse a method that a member cannot serve, or that reads layers."""
        super().check_term(term)
        if not self.covers_vocabulary:
            for member in self.members:
                member.check_term(term)

    def forms(self, terms: Sequence[WeightedTerm]) -> Sequence[WeightedTerm]:
        """Return the terms in the members' form, which is the same for all."""
        return self.members[0].forms(terms)

    def measurements(self, stage: str, is_own: bool) -> Iterator[Measurement]:
        """Yield the measurements of models in memory, or of served models."""
        if self.covers_vocabulary:
            return super().measurements(stage, is_own)
        return self.members[0].measurements(stage, is_own)

    def adapted(self, adapt: Callable[[Teacher], Teacher]) -> Teacher:
        """Put an online module on every model."""
        return self.with_members(lambda number, one: one.adapted(adapt))

    def generators(self) -> Sequence[GeneratingModels]:
        """Return every member's models."""
        return [member.generator() for member in self.members]

    def generator_of(self, prompt: Prompt) -> int:
        """Return the number of the member that answers a prompt.

        Raises:
            ConfigError: The prompt names no teacher.
        """
        if prompt.teacher < 0 < len(self.members) - 1:
            raise ConfigError(
                "a prompt names no teacher to answer it, and RoutedTeachers has one for each row: "
                "give --data.teacher_column"
            )
        return self._places[prompt.teacher]

    def side(self, batch: DistillBatch, quantities: Sequence[Quantity]) -> Side:
        """Return the sides of all rows' teachers as one, with gradient as each one gives it."""
        learns = torch.is_grad_enabled() and any(q.trains_teacher for q in quantities)
        return self._routed(batch, lambda member, part: member.side(part, quantities), learns)

    def base_side(self, batch: DistillBatch) -> Side:
        """Return the same without trained parameters; a constant."""
        return self._routed(batch, lambda member, part: member.base_side(part), False)

    def _routed(self, batch: DistillBatch, read: _Read, learns: bool) -> Side:
        if len(self.members) == 1:
            return read(self.members[0], batch)
        if batch.teacher is None:
            raise ConfigError(
                "the rows of a batch name no teacher, and RoutedTeachers has one for each row: "
                "give DistillBatch.teacher the numbers of model.teacher.teachers, or train on a "
                "RolloutDataModule with --data.teacher_column"
            )
        members = [self._places[number] for number in batch.teacher_of_rows]
        sides, places = [], []
        for number, member in enumerate(self.members):
            rows = [row for row, of_row in enumerate(members) if of_row == number]
            if len(rows) == len(members):
                part = batch
            elif rows:
                part = batch.of_rows(rows)
            elif self._runs_along(number, batch, learns):
                part = fully_masked(batch)
            else:
                continue
            sides.append(read(member, part))
            places.append(_positions(batch, rows))
        return sides[0] if len(sides) == 1 else routed_side(sides, places)

    def _runs_along(self, number: int, batch: DistillBatch, learns: bool) -> bool:
        """Return whether a member without rows here runs over a fully masked row.

        The passes of a sharded model are collective: all ranks run a model that any rank needs in
        this step. A member that is trained gets a gradient of 0, on every strategy.
        """
        member, present = self.members[number], batch.teachers_present
        if learns and member.trained_parameters():
            return True
        is_needed = present is None or number in {self._places[one] for one in present}
        return is_needed and any(isinstance(model, FSDPModule) for model in member.models)


def _check_one_form(members: Sequence[Teacher]) -> None:
    """Refuse members whose sides have different forms: logits, or known ids and the rest.

    Raises:
        ConfigError: The message says what to change.
    """
    sizes = {member.k if isinstance(member, PackedTeacher) else 0 for member in members}
    if len(sizes) > 1 and 0 in sizes:
        raise ConfigError(
            "RoutedTeachers has models in memory and a ServedTeacher, whose divergences are over "
            "other outcomes: serve all of them, or give folders or hub ids alone"
        )
    if len(sizes) > 1:
        raise ConfigError(
            f"RoutedTeachers has served teachers of k {', '.join(map(str, sorted(sizes)))}, whose "
            "divergences are over other outcomes: give all of them the same k"
        )


def _checked_name(name: Any) -> str:
    """Return a teacher's name as rows have it: a whole number is read as its digits."""
    if isinstance(name, int) and not isinstance(name, bool):
        return str(name)
    if not isinstance(name, str):
        raise ConfigError(
            f"model.teacher.teachers has the name {name!r}, which YAML does not read as text; put "
            "the name in quotes"
        )
    if not name.strip():
        raise ConfigError("model.teacher.teachers has an empty name; expected one per teacher")
    return name


def fully_masked(batch: DistillBatch) -> DistillBatch:
    """Return one row of a batch without loss."""
    row = batch.of_rows([min(range(len(batch)), key=batch.teacher_reads.row_lengths.__getitem__)])
    own = row.teacher_mask
    masked = None if own is None else torch.zeros_like(own)
    return replace(row, mask=torch.zeros_like(row.mask), teacher_mask=masked)


def _positions(batch: DistillBatch, rows: Sequence[int]) -> Tensor:
    """Return [positions of some rows] their places among all positions of the batch."""
    of_row = batch.teacher_reads.places.row
    return torch.isin(of_row, of_row.new_tensor(rows)).nonzero().squeeze(-1)


def _key(teacher: Teacher) -> object:
    """Return a key that is equal for teachers of one checkpoint."""
    given = argument_of(teacher)
    if isinstance(given, LoadedTeacher):  # in host memory
        return "host", _key(LoadedTeacher(given.own_source))
    if isinstance(given, str):
        path = Path(given).expanduser()
        return str(path.resolve()) if path.exists() else given
    return id(given) if isinstance(given, PreTrainedModel | Teacher | Mapping) else given
