"""A student and its teacher: their tokenizer, their loading, and their common vocabulary."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from os import PathLike, fspath

from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from okd_lightning.errors import ConfigError, ModelNotFoundError, VocabularyError
from okd_lightning.models.adapters import without_adapter
from okd_lightning.models.causality import check_causal
from okd_lightning.models.loading import (
    DTypeName,
    ModelSource,
    load_causal_lm,
    load_model_config,
    load_tokenizer,
)
from okd_lightning.models.vocabulary import Vocabulary, check_vocabulary_agreement
from okd_lightning.models.weight_checks import Learns


def find_tokenizer(
    tokenizer: str | PathLike[str] | PreTrainedTokenizerBase | None,
    student: ModelSource,
    teacher: ModelSource | None,
) -> PreTrainedTokenizerBase:
    """Return the run's tokenizer: the given one, else the student's, else the teacher's.

    Args:
        tokenizer: The user's tokenizer, or its folder or hub id; None where none is given.
        student: Source of the student.
        teacher: Source of the teacher; None where it is not loaded from files.

    Raises:
        ConfigError: There is none, or ``tokenizer`` is of another type.
        ModelNotFoundError: It cannot be loaded.
    """
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        return tokenizer
    if isinstance(tokenizer, PathLike):
        tokenizer = fspath(tokenizer)
    if tokenizer is not None and not isinstance(tokenizer, str):
        raise ConfigError(
            f"model.tokenizer is a {type(tokenizer).__name__}; expected a folder or hub id, or a "
            "tokenizer of transformers, such as PreTrainedTokenizerFast(tokenizer_object=...)"
        )
    options: dict[str, ModelSource | None] = {
        "--model.tokenizer": tokenizer,
        "--model.student": student,
        "--model.teacher": teacher,
    }
    for option, source in options.items():
        name = source.name_or_path if isinstance(source, PreTrainedModel) else source
        if isinstance(name, str) and name:
            return load_tokenizer(name, option)
    raise ConfigError(
        "no tokenizer: neither the student nor the teacher is a folder or hub id; "
        "give --model.tokenizer a folder or hub id"
    )


def load_checked(
    source: ModelSource,
    option: str,
    vocab_size: int,
    *,
    dtype: DTypeName,
    attn_implementation: str | None,
    learns: Learns = "nothing",
) -> PreTrainedModel:
    """Load a model and check that it is causal; see ``load_causal_lm`` for the arguments.

    If nothing is trained, the adapter of a model in memory is merged into a copy.

    Raises:
        ModelError: The model cannot be loaded, or is not causal.
    """
    config = load_model_config(source, option, vocab_size)
    model = load_causal_lm(
        source,
        config,
        option,
        dtype=dtype,
        attn_implementation=attn_implementation,
        learns=learns,
    )
    if learns == "nothing":
        model = without_adapter(model)
    check_causal(model, option)
    return model


def check_pair(
    tokenizer: PreTrainedTokenizerBase, student: ModelSource, teachers: Sequence[ModelSource]
) -> Vocabulary:
    """Return the vocabulary on which all models are compared: ids with a row in every table.

    Args:
        tokenizer: The run's tokenizer.
        student: Source of the student.
        teachers: Sources of the teacher's models.

    Raises:
        VocabularyError: A model's own tokenizer differs.
    """
    known = vocabulary = Vocabulary.of(tokenizer)
    named = [("--model.student", student), *(("--model.teacher", one) for one in teachers)]
    for option, source in named:
        rows = _table_rows(source, option, known.size)
        vocabulary = vocabulary.within(rows)
        if isinstance(source, str) and source != tokenizer.name_or_path:
            _check_own_tokenizer(tokenizer, source, option, rows)
    if vocabulary != known:
        first = tokenizer.convert_ids_to_tokens(vocabulary.size)
        rank_zero_info(
            f"the tokenizer has ids up to {known.size - 1}, the models' tables rows up to "
            f"{vocabulary.size - 1}: ids from {vocabulary.size} ({first!r}) on are never sampled, "
            "and a row that uses one is an error"
        )
    return vocabulary


def vocabulary_of(
    tokenizer: PreTrainedTokenizerBase, source: ModelSource, option: str
) -> Vocabulary:
    """Return the ids of a model by itself: those of its tokenizer with a row in its tables."""
    known = Vocabulary.of(tokenizer)
    return known.within(_table_rows(source, option, known.size))


def check_joins(
    tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary, source: ModelSource, option: str
) -> None:
    """Refuse a further model that cannot be compared with a pair.

    Args:
        tokenizer: The pair's.
        vocabulary: What both models of the pair have rows for.
        source: The further model.
        option: How the user named it, for messages.

    Raises:
        VocabularyError: Its own tokenizer differs, or its table has fewer rows.
    """
    rows = _table_rows(source, option, vocabulary.size)
    if rows < vocabulary.size:
        raise VocabularyError(
            f"{option} has rows for ids up to {rows - 1}, and student and teacher are compared on "
            f"ids up to {vocabulary.size - 1}; give a model of the teacher's own family"
        )
    if isinstance(source, str) and source != tokenizer.name_or_path:
        _check_own_tokenizer(tokenizer, source, option, rows)


def _table_rows(source: ModelSource, option: str, vocab_size: int) -> int:
    """Return the rows of a model's embedding or head, whichever has fewer."""
    rows = int(load_model_config(source, option, vocab_size).get_text_config().vocab_size)
    if not isinstance(source, PreTrainedModel):
        return rows
    tables = (source.get_input_embeddings(), source.get_output_embeddings())
    weights = [getattr(table, "weight", None) for table in tables]
    lengths = [len(w) for w in weights if isinstance(w, Tensor) and w.dim() == 2]
    return min([rows, *lengths])


def _check_own_tokenizer(
    tokenizer: PreTrainedTokenizerBase, source: str, option: str, rows: int
) -> None:
    try:
        own = load_tokenizer(source, option)
    except ModelNotFoundError as error:
        warnings.warn(f"{error}; the run's tokenizer is not compared with it", stacklevel=2)
        return
    try:
        check_vocabulary_agreement(tokenizer, own, rows)
    except VocabularyError as error:
        if option != "--model.teacher":
            raise
        raise VocabularyError(
            f"{error}; or have the texts of both compared: --model.teacher ForeignTeacher "
            f"--model.teacher.model {source}"
        ) from error
