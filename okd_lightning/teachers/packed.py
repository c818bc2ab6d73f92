"""The PackedTeacher: a teacher known by k ids per token, without a model in memory."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import ClassVar

from okd_lightning.errors import ConfigError
from okd_lightning.losses import Quantity, Side, StateQuantity, Term, WeightedTerm
from okd_lightning.metrics import cached_measures
from okd_lightning.records.batches import DistillBatch
from okd_lightning.teachers.base import Measurement, Teacher
from okd_lightning.teachers.run import GeneratingModels, Opening
from okd_lightning.teachers.terms import cached_terms, check_cached_term


class PackedTeacher(Teacher):
    """A teacher whose side is packed rows (``losses.outcomes``): k ids, the rest, the target.

    Methods read their divergences as ``TopK(., k)``.

    Attributes:
        k: Known ids per token.
    """

    generates = False
    reads_images = False
    covers_vocabulary = False
    reads_new_rows: ClassVar[bool] = False
    """True where it can score on-policy responses."""

    k: int

    @abstractmethod
    def side(self, batch: DistillBatch, quantities: Sequence[Quantity]) -> Side:
        """Return packed rows at the loss positions; a constant."""

    @abstractmethod
    def open(self, opening: Opening) -> None:
        """Make the rows of this run available."""

    def build(self) -> None:
        """Do nothing: there is no model here."""

    def check_term(self, term: Term) -> None:
        """Refuse a method that needs the teacher itself."""
        if any(isinstance(quantity, StateQuantity) for quantity in term.quantities):
            super().check_term(term)  # the student's states alone need no teacher
            return
        size = self.run.vocabulary.size
        check_cached_term(term, self.k, size, self.option, self.reads_new_rows)

    def check_adaptable(self) -> None:
        """Refuse: there is no model here to put a module on."""
        raise ConfigError(
            "an online module is trained on a teacher that is run in this process, and "
            f"{self.option} does not run one: leave it out, or use another method"
        )

    def generator(self) -> GeneratingModels:
        """Refuse: there is no model here."""
        raise ConfigError(
            f"{self.option} has no model in this process that could generate as the teacher: give "
            "--model.teacher a folder or hub id"
        )

    def forms(self, terms: Sequence[WeightedTerm]) -> Sequence[WeightedTerm]:
        """Return the terms with their quantities in the form for k known ids."""
        return cached_terms(terms, self.k, self.run.vocabulary.size)

    def measurements(self, stage: str, is_own: bool) -> Iterator[Measurement]:
        """Yield lower bounds of the divergences; see ``metrics.cached_measures``."""
        yield nullcontext(), cached_measures(stage, is_own, self.k, self.reads_new_rows)
