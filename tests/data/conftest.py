"""Fixtures of the data tests: real tokenizers, and tokenizers with one id per byte."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from byte_tokenizer import CHATML, make_byte_tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from okd_lightning.data import Columns, ExampleSet, build_examples


@pytest.fixture(scope="session")
def real_tokenizer(shared_data: Path) -> Callable[[str], PreTrainedTokenizerBase]:
    """Loads a real tokenizer by its folder under the shared data, once: change copies only."""
    return cache(lambda folder: AutoTokenizer.from_pretrained(shared_data / folder))


@pytest.fixture
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """``make_byte_tokenizer(opening, closing)``."""
    return make_byte_tokenizer


@pytest.fixture
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Byte tokenizer without bos and chat template."""
    return make_byte_tokenizer()


@pytest.fixture
def chat_tokenizer() -> PreTrainedTokenizerFast:
    """The byte tokenizer with ChatML."""
    tokenizer = make_byte_tokenizer()
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture
def build() -> Callable[..., ExampleSet]:
    """``build_examples`` with generous limits; whatever is given by name overrides them."""

    def build_with_defaults(
        rows: list, tokenizer: PreTrainedTokenizerBase, **overrides
    ) -> ExampleSet:
        settings = {
            "eos_id": tokenizer.eos_token_id,
            "columns": Columns(),
            "max_prompt_length": 10_000,
            "max_response_length": 10_000,
            "on_overlong": "error",
            "needs_response": True,
            "where": "rows.jsonl",
        }
        return build_examples(rows, tokenizer, **{**settings, **overrides})

    return build_with_defaults
