"""Which methods a cached teacher can serve, and a method as it is read from the cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

from okd_lightning.errors import ConfigError
from okd_lightning.losses import Measured, Quantity, Term, WeightedTerm, cached_form
from okd_lightning.records import LossOutput

_ADVICE = "; leave --model.teacher_cache out for this run"


def check_cached_term(term: Term, k: int, vocab_size: int) -> None:
    """Refuse a method that needs the teacher itself.

    Args:
        term: The method's.
        k: Ids that the cache holds.
        vocab_size: Ids that there are.

    Raises:
        ConfigError: It acts on rows that only the run itself brings forth, has the teacher write
            or learn, or asks for more than k probabilities.
    """
    if "teacher" in term.sources:
        raise ConfigError(f"method {term.name} has the teacher write responses{_ADVICE}")
    needs_teacher = any(quantity.needs_teacher for quantity in term.quantities)
    if needs_teacher and "student" in term.sources:
        raise ConfigError(
            f"method {term.name} asks the teacher about responses that the student writes in this "
            f"run, and no cache can hold those{_ADVICE}, or set on_policy_fraction to 0"
        )
    for quantity in term.quantities:
        if quantity.trains_teacher or quantity.needs_base_teacher:
            raise ConfigError(
                f"method {term.name} has a teacher that learns, and a cached one stays as it was"
                f"{_ADVICE}"
            )
        try:
            cached_form(quantity, k, vocab_size)
        except ConfigError as error:
            raise ConfigError(f"method {term.name} with a cached teacher: {error}") from error


class CachedTerm:
    """A term that asks for what is cached, and reads it as what it had asked for.

    Args:
        term: The method's; everything else is its own.
        k: Ids that the cache holds.
        vocab_size: Ids that there are.
    """

    def __init__(self, term: Term, k: int, vocab_size: int) -> None:
        self._term = term
        self._forms = {q: cached_form(q, k, vocab_size) for q in term.quantities}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._term, name)

    @property
    def quantities(self) -> tuple[Quantity, ...]:
        """The term's, in their cached form."""
        return tuple(self._forms.values())

    def loss(self, measured: Measured) -> LossOutput:
        """The term's."""
        values = {quantity: measured[form] for quantity, form in self._forms.items()}
        return self._term.loss(replace(measured, values=values))


def cached_terms(
    terms: Sequence[WeightedTerm], k: int, vocab_size: int
) -> tuple[WeightedTerm, ...]:
    """The same terms with the same factors, as they are read from the cache."""
    return tuple(
        replace(weighted, term=cast(Term, CachedTerm(weighted.term, k, vocab_size)))
        for weighted in terms
    )
