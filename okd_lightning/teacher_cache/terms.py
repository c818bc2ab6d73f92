"""Which methods a cached teacher can serve, and a method as it is read from the cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

from okd_lightning.errors import ConfigError
from okd_lightning.losses import (
    Measured,
    Quantity,
    Term,
    WeightedTerm,
    cached_form,
)
from okd_lightning.records import LossOutput


def check_known(quantities: Sequence[Quantity], k: int, vocab_size: int, option: str) -> None:
    """Refuse to measure what needs more of the teacher than k ids; it is our own measures' guard.

    Args:
        quantities: What is asked for.
        k: Ids that are known.
        vocab_size: Ids that there are.
        option: How the user chose such a teacher.

    Raises:
        ConfigError: One of them is not in its cached form.
    """
    for quantity in quantities:
        if cached_form(quantity, k, vocab_size) != quantity:
            raise ConfigError(
                f"{quantity} was asked of a teacher of whom {k} ids are known: measure it without "
                f"{option}, or where nothing is trained (okd-lightning validate)"
            )


def check_cached_term(
    term: Term,
    k: int,
    vocab_size: int,
    option: str = "--model.teacher_cache",
    reads_new_rows: bool = False,
) -> None:
    """Refuse a method that needs the teacher itself.

    Args:
        term: The method's.
        k: Ids that are known of the teacher.
        vocab_size: Ids that there are.
        option: How the user chose such a teacher.
        reads_new_rows: Whether it can be asked about what the student writes.

    Raises:
        ConfigError: It acts on rows that only the run itself brings forth, has the teacher write
            or learn, or asks for more than k probabilities.
    """
    advice = f"; leave {option} out for this run"
    if "teacher" in term.sources:
        raise ConfigError(f"method {term.name} has the teacher write responses{advice}")
    needs_teacher = any(quantity.needs_teacher for quantity in term.quantities)
    if needs_teacher and "student" in term.sources and not reads_new_rows:
        raise ConfigError(
            f"method {term.name} asks the teacher about responses that the student writes in this "
            f"run, and no cache can hold those{advice}, or set on_policy_fraction to 0"
        )
    for quantity in term.quantities:
        if quantity.needs_base_teacher and not quantity.trains_teacher:
            raise ConfigError(
                f"method {term.name} compares the teacher with its base, and here there is no "
                f"teacher in memory{advice}"
            )
        if quantity.trains_teacher:
            raise ConfigError(
                f"method {term.name} has a teacher that learns, and this one stays as it was"
                f"{advice}"
            )
        kind = "served" if reads_new_rows else "cached"
        try:
            cached_form(quantity, k, vocab_size)
        except ConfigError as error:
            raise ConfigError(f"method {term.name} with a {kind} teacher: {error}") from error


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
