"""A student and its teacher: both loaded alike, on one tokenizer, and whether they compare."""

from __future__ import annotations

import warnings

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from okd_lightning.errors import ConfigError, ModelNotFoundError
from okd_lightning.models.causality import check_causal
from okd_lightning.models.loading import (
    DTypeName,
    ModelSource,
    load_causal_lm,
    load_model_config,
    load_tokenizer,
)
from okd_lightning.models.vocabulary import Vocabulary, check_vocabulary_agreement


def find_tokenizer(
    tokenizer: str | PreTrainedTokenizerBase | None,
    student: ModelSource,
    teacher: ModelSource | None,
) -> PreTrainedTokenizerBase:
    """The run's tokenizer: the one that was named, else the student's, else the teacher's.

    Raises:
        ConfigError: None of them has one.
        ModelNotFoundError: It cannot be loaded.
    """
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        return tokenizer
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
) -> PreTrainedModel:
    """A causal LM that looks at no later token; see ``load_causal_lm`` for the arguments.

    Raises:
        ModelError: It cannot be loaded, or is not causal.
    """
    config = load_model_config(source, option, vocab_size)
    model = load_causal_lm(
        source, config, option, dtype=dtype, attn_implementation=attn_implementation
    )
    check_causal(model, option)
    return model


def check_pair(
    tokenizer: PreTrainedTokenizerBase, student: ModelSource, teacher: ModelSource | None
) -> Vocabulary:
    """The vocabulary on which both models are compared.

    Raises:
        VocabularyError: A model's own tokenizer differs, or its embedding table is too small.
    """
    vocabulary = Vocabulary.of(tokenizer)
    for option, source in (("--model.student", student), ("--model.teacher", teacher)):
        if source is None:
            continue
        vocabulary.check_fits(load_model_config(source, option, vocabulary.size), option)
        if isinstance(source, str) and source != tokenizer.name_or_path:
            _check_own_tokenizer(tokenizer, source, option)
    return vocabulary


def _check_own_tokenizer(tokenizer: PreTrainedTokenizerBase, source: str, option: str) -> None:
    try:
        own = load_tokenizer(source, option)
    except ModelNotFoundError as error:
        warnings.warn(f"{error}; the run's tokenizer is taken on trust", stacklevel=2)
        return
    check_vocabulary_agreement(tokenizer, own)
