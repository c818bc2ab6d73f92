"""Methods that work with a cached teacher, and their form for one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from okd_lightning.errors import ConfigError
from okd_lightning.losses import (
    Measured,
    Quantity,
    Term,
    WeightedTerm,
    cached_form,
    token_values,
)
from okd_lightning.records.batches import LossOutput


def check_known(quantities: Sequence[Quantity], k: int, vocab_size: int, option: str) -> None:
    """Refuse quantities that need more of the teacher than k ids, such as a metric's.

    Args:
        quantities: The quantities.
        k: Ids of the teacher that are known.
        vocab_size: Ids of the vocabulary.
        option: The user's option for such a teacher.

    Raises:
        ConfigError: One of them is not in its cached form.
    """
    for quantity in quantities:
        if cached_form(quantity, k, vocab_size) != quantity:
            raise ConfigError(
                f"{quantity} needs more of the teacher than its {k} known ids: measure it with a "
                f"loaded teacher in place of {option.rpartition(' ')[2]} (--model.teacher FOLDER)"
            )


def check_cached_term(
    term: Term,
    k: int,
    vocab_size: int,
    option: str = "--model.teacher CachedTeacher",
    reads_new_rows: bool = False,
) -> None:
    """Refuse a method that needs the teacher itself.

    Args:
        term: The method's term.
        k: Ids of the teacher that are known.
        vocab_size: Ids of the vocabulary.
        option: The user's option for such a teacher.
        reads_new_rows: Whether the teacher can score on-policy responses.

    Raises:
        ConfigError: It needs a cached teacher on on-policy rows, makes the teacher generate or
            learn, or needs more than k probabilities.
    """
    advice = f"; give --model.teacher a folder or hub id in place of {option.rpartition(' ')[2]}"
    if term.asks_teacher:
        raise ConfigError(f"method {term.name} has the teacher generate responses{advice}")
    needs_teacher = any(quantity.needs_teacher for quantity in term.quantities)
    if needs_teacher and "student" in term.sources and not reads_new_rows:
        raise ConfigError(
            f"method {term.name} needs the teacher on responses that the student generates in this "
            f"run, which no cache can hold{advice}, or set on_policy_fraction to 0"
        )
    for quantity in term.quantities:
        if quantity.needs_base_teacher and not quantity.trains_teacher:
            raise ConfigError(
                f"method {term.name} compares the teacher with its base, and here there is no "
                f"teacher in memory{advice}"
            )
        if quantity.trains_teacher:
            raise ConfigError(
                f"method {term.name} trains the teacher, and this one cannot be trained{advice}"
            )
        kind = "served" if reads_new_rows else "cached"
        try:
            cached_form(quantity, k, vocab_size)
        except ConfigError as error:
            raise ConfigError(f"method {term.name} with a {kind} teacher: {error}") from error


def check_served_text_term(term: Term, option: str) -> None:
    """Refuse a method over texts that needs more than log-probabilities of the teacher's tokens.

    Args:
        term: The method's term.
        option: The user's option for such a teacher.

    Raises:
        ConfigError: A teacher that learns or is compared with its base, or a temperature.
    """
    name = option.rpartition(" ")[2]
    advice = f"give --model.teacher.model a folder or hub id in place of {name}"
    for quantity in term.quantities:
        if not quantity.needs_teacher:
            continue
        if quantity.trains_teacher or quantity.needs_base_teacher:
            raise ConfigError(
                f"method {term.name} trains the teacher or compares it with its base, and {name} "
                f"supports neither; {advice}"
            )
        for reader, of_token in token_values(quantity):
            temperature = getattr(of_token, "temperature", 1.0)
            if reader != "student" and temperature != 1.0:
                raise ConfigError(
                    f"method {term.name} has softmax temperature {temperature:g}, and {name} gives "
                    f"probabilities at temperature 1 alone; set the temperature to 1, or {advice}"
                )


def cached_term(term: Term, k: int, vocab_size: int) -> Term:
    """Return a term whose quantities are measured in their cached form.

    Args:
        term: The method's term.
        k: Ids of the teacher that are known.
        vocab_size: Ids of the vocabulary.
    """
    forms = {quantity: cached_form(quantity, k, vocab_size) for quantity in term.quantities}

    def loss(measured: Measured) -> LossOutput:
        values = {quantity: measured[form] for quantity, form in forms.items()}
        return term.loss(replace(measured, values=values))

    return replace(term, quantities=tuple(forms.values()), loss=loss)


def cached_terms(
    terms: Sequence[WeightedTerm], k: int, vocab_size: int
) -> tuple[WeightedTerm, ...]:
    """Return the terms with their factors in the form for a cached teacher.

    Terms of the student's states stay as they are: the teacher does not take part in them.
    """
    return tuple(
        weighted
        if weighted.term.reads_states
        else replace(weighted, term=cached_term(weighted.term, k, vocab_size))
        for weighted in terms
    )
