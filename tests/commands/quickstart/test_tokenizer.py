"""Semantics frozen here: one id a character, nothing added, nothing lost.

A character outside the alphabet is ``<unk>``: visible, and never one of the others.

The committed folder is what the code makes, and ``AutoTokenizer`` reads it.
"""

import pytest
from transformers import AutoTokenizer

from okd_lightning.commands.quickstart.task import draw_problems
from okd_lightning.commands.quickstart.tokenizer import (
    ALPHABET,
    TOKENIZER_DIR,
    build_tokenizer,
    main,
)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TOKENIZER_DIR)


def test_ids_are_the_specials_then_the_alphabet(tokenizer):
    tokens = ["<pad>", "<eos>", "<unk>", *ALPHABET]
    assert tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))) == tokens
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert tokenizer.bos_token_id is None


def test_a_text_is_its_characters_and_comes_back(tokenizer):
    for problem in draw_problems(50, seed=21):
        text = problem.prompt + problem.response
        ids = tokenizer(text)["input_ids"]
        assert [tokenizer.convert_ids_to_tokens(i) for i in ids] == list(text)
        assert tokenizer.decode([*ids, 1, 0, 0], skip_special_tokens=True) == text


def test_prompt_and_response_tokenize_apart_as_they_do_together(tokenizer):
    problem = draw_problems(1, seed=22)[0]
    apart = tokenizer(problem.prompt)["input_ids"] + tokenizer(problem.response)["input_ids"]
    assert apart == tokenizer(problem.prompt + problem.response)["input_ids"]


@pytest.mark.parametrize("character", [" ", "a", "\n", "²"])
def test_a_foreign_character_is_unknown(tokenizer, character):
    ids = tokenizer(f"1{character}2")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["1", "<unk>", "2"]


def test_the_committed_folder_is_what_the_code_makes(tmp_path, tokenizer):
    main([str(tmp_path)])
    made, committed = tmp_path / "tokenizer.json", TOKENIZER_DIR / "tokenizer.json"
    assert made.read_text() == committed.read_text()
    assert build_tokenizer().get_vocab() == tokenizer.get_vocab()
