"""Split of texts by a GGUF file's tokenizer before its merges.

* The file's name for the split decides where transformers gives GPT-2's: single digits for SmolLM2,
  the expressions of Llama 3 and Qwen2; GPT-2's own, and a split that transformers reads, stay.
* An unknown name is a warning that says what to give instead; a file without one is GPT-2's.
"""

from __future__ import annotations

import warnings

import pytest
import tiny
from quantised_models import write_gguf
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from okd_lightning.models import load_tokenizer
from okd_lightning.models.gguf_files import restore_split

TEXT = "It's x  1234 5%"
GPT2 = ["It", "'s", "Ġx", "Ġ", "Ġ1234", "Ġ5", "%"]
EXPECTED = {
    "smollm": ["It", "'s", "Ġx", "ĠĠ", "1", "2", "3", "4", "Ġ", "5", "%"],
    "llama-bpe": ["It", "'s", "Ġx", "Ġ", "Ġ", "123", "4", "Ġ", "5", "%"],
    "qwen2": ["It", "'s", "Ġx", "Ġ", "Ġ", "1", "2", "3", "4", "Ġ", "5", "%"],
    "gpt-2": GPT2,
    "default": GPT2,
}


def byte_level() -> PreTrainedTokenizerFast:
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def parts(tokenizer) -> list[str]:
    return [part for part, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(TEXT)]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A file for each name of a split."""
    folder, model = tmp_path_factory.mktemp("gguf"), tiny.make_llama(1)
    names = [*EXPECTED, "of-tomorrow"]
    for name in names:
        write_gguf(folder / f"{name}.gguf", model, is_quantised=False, split=name)
    return {name: folder / f"{name}.gguf" for name in names}


@pytest.mark.parametrize("name", EXPECTED)
def test_the_files_name_decides(name, written):
    tokenizer = byte_level()
    restore_split(tokenizer, written[name], "--model")
    assert parts(tokenizer) == EXPECTED[name]


def test_a_loaded_files_tokenizer_has_it(written):
    assert parts(load_tokenizer(str(written["smollm"]), "--model")) == EXPECTED["smollm"]


def test_an_unknown_name_is_a_warning(written):
    tokenizer = byte_level()
    with pytest.warns(UserWarning, match=r"rule 'of-tomorrow', which cannot .* --model.tokenizer"):
        restore_split(tokenizer, written["of-tomorrow"], "--model.teacher")
    assert parts(tokenizer) == GPT2


def test_a_file_without_a_name_and_another_split_stay(tmp_path, written):
    (tmp_path / "empty.gguf").write_bytes(b"GGUF" + bytes(20))
    tokenizer = byte_level()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        restore_split(tokenizer, tmp_path / "empty.gguf", "--model")
        assert parts(tokenizer) == GPT2
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        restore_split(tokenizer, written["smollm"], "--model")
    assert parts(tokenizer) == ["It", "'", "s", "x", "1234", "5", "%"]
