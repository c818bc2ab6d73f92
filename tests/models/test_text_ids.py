"""Semantics frozen here: ids of prompt + response are the tokenizer's ids of the whole text.

Prompt ids depend on the prompt alone and have one opening; prompt and continuation decode to what
the tokenizer makes of the whole text, or to the text itself; a response has one end, found by its
id. Held for random texts, with blanks, line breaks and texts of special tokens at their edges, over
real tokenizers and small ones of every kind. A text that is longer than its limit is cut before it
is tokenized, which changes no id within the limit.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from okd_lightning.data.text_rows import ended
from okd_lightning.errors import DataError
from okd_lightning.models.text_ids import MARGIN, TextEncoder

CORPUS = ["He said yes, 2+2=4.\n\nOnce upon a time  there was\na cat: the (cat) said 'no'."] * 4
SPECIALS = ["<pad>", "</s>", "<s>", "<unk>", "<|im_end|>"]


def wrapped(backend: Tokenizer, opening: str = "", closing: str = "", **names: str):
    """A transformers tokenizer that writes ``opening`` and ``closing`` around every text."""
    if opening or closing:
        template = processors.TemplateProcessing(
            single=f"{opening} $A {closing}".strip(),
            special_tokens=[(t, backend.token_to_id(t)) for t in {opening, closing} - {""}],
        )
        inner = [backend.post_processor] if backend.post_processor else []
        backend.post_processor = processors.Sequence([*inner, template])
    given = {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>", **names}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **given)


def byte_level(add_prefix_space: bool = False) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def sentencepiece_like(scheme: str) -> Tokenizer:
    """Llama's kind: a "▁" before a text, by the pre-tokenizer or by the normalizer."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    if scheme == "normalizer":
        backend.normalizer = normalizers.Sequence(
            [
                normalizers.Strip(),
                normalizers.Replace(Regex(" {2,}"), " "),
                normalizers.Prepend("▁"),
                normalizers.Replace(" ", "▁"),
            ]
        )
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=120, special_tokens=SPECIALS, initial_alphabet=["b", "x"], show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def unigram() -> Tokenizer:
    """T5's kind: pieces of a unigram model, "▁" before every stretch."""
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Strip(left=False, right=True)]
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=70, special_tokens=SPECIALS, unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def characters() -> Tokenizer:
    vocabulary = {t: i for i, t in enumerate([*SPECIALS, *sorted(set("".join(CORPUS)) | {"b"})])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in SPECIALS])
    return backend


MADE: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "byte-level": lambda: wrapped(byte_level()),
    "byte-level with a prefix space": lambda: wrapped(byte_level(True)),
    "byte-level, bos, as Llama 3": lambda: wrapped(byte_level(), "<s>"),
    "byte-level, bos and eos added": lambda: wrapped(byte_level(), "<s>", "</s>"),
    "byte-level, one token for all": lambda: wrapped(
        byte_level(), pad_token="</s>", bos_token="</s>", unk_token="</s>"
    ),
    "byte-level, eos around": lambda: wrapped(byte_level(), "</s>", "</s>", bos_token="</s>"),
    "metaspace first": lambda: wrapped(sentencepiece_like("first"), "<s>", unk_token="<unk>"),
    "metaspace always": lambda: wrapped(sentencepiece_like("always"), "<s>", unk_token="<unk>"),
    "metaspace, no bos": lambda: wrapped(
        sentencepiece_like("always"), "", "</s>", bos_token=None, unk_token="<unk>"
    ),
    "prepend": lambda: wrapped(sentencepiece_like("normalizer"), "<s>", unk_token="<unk>"),
    "unigram": lambda: wrapped(unigram(), "", "</s>", bos_token=None, unk_token="<unk>"),
    "characters": lambda: wrapped(characters(), unk_token="<unk>"),
    "characters, bos": lambda: wrapped(characters(), "<s>", unk_token="<unk>"),
    "characters, cleaned up": lambda: wrapped(
        characters(), "<s>", unk_token="<unk>", clean_up_tokenization_spaces=True
    ),
}
REAL = ["tokenizers/gpt2", "tokenizers/llama2", "tokenizers/qwen2.5"]
REAL += ["models/stories260K", "models/babyllama-tok105"]


@cache
def encoder_of(name: str, folder: Path | None = None) -> TextEncoder:
    tokenizer = MADE[name]() if folder is None else AutoTokenizer.from_pretrained(folder / name)
    return TextEncoder(tokenizer)


@pytest.fixture(params=[*MADE, *REAL])
def encoder(request) -> TextEncoder:
    folder = request.getfixturevalue("shared_data") if request.param in REAL else None
    return encoder_of(request.param, folder)


WORDS = ["said", "yes", "2+2=", "4", "cat", "(", "x)", "b", "é", "e", "\u0301", "中", "🙂", "."]
EDGES = ["", "", " ", "  ", "\n", "\t", " \n"]
SPECIAL_EDGES = ["", "", "", "<s>", "</s>", "<|im_end|>", "<|endoftext|>", "<pad>"]
texts = st.tuples(
    st.sampled_from(SPECIAL_EDGES),
    st.sampled_from(EDGES),
    st.lists(st.sampled_from(WORDS) | st.text(max_size=3), max_size=4).map("".join),
    st.sampled_from(EDGES),
    st.sampled_from(SPECIAL_EDGES),
).map("".join)


def is_text(text: str) -> bool:
    return not any(unicodedata.category(c) in ("Cs", "Cc") and c not in "\n\t" for c in text)


@settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(prompt=texts.filter(is_text), response=texts.filter(is_text))
def test_prompt_and_response_are_the_whole_text(encoder, prompt, response):
    tokenizer = encoder.tokenizer
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    (prompt_ids,) = encoder.prompts([prompt])
    (rest,) = encoder.continuations([prompt], [response])
    response_ids = ended(rest, encoder, [eos])

    def decode(ids):
        return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    whole = tokenizer(prompt + response, add_special_tokens=False).input_ids
    bare = tokenizer(prompt, add_special_tokens=False).input_ids
    if whole[: len(bare)] == bare:
        assert bare + rest == whole
    else:  # a token reaches over the edge
        as_written = decode([i for part in (bare, rest) for i in part])
        plain = prompt + response
        for special in tokenizer.all_special_tokens:
            plain = plain.replace(special, "")
        found, *expected = (
            unicodedata.normalize("NFKC", text).strip()
            for text in (as_written, decode(whole), plain)
        )
        assert found in expected
    if prompt_ids:
        opens = bos is not None and (
            tokenizer("b").input_ids[0] == bos or tokenizer(prompt).input_ids[:1] == [bos]
        )
        assert not opens or (prompt_ids[0] == bos and prompt_ids[1:2] != [bos])
    if rest:
        assert response_ids[-1] == eos
        assert [*prompt_ids, *response_ids][-2:] != [eos, eos] or len(response_ids) == 1


@pytest.mark.parametrize("name", ["metaspace always", "metaspace first", "prepend"])
@pytest.mark.parametrize(
    ("prompt", "response"),
    [("2+2=", "4"), ("said (", "cat)"), ("cat:", "\nno"), ("He said", " yes"), ("Onc", "e")],
)
def test_no_space_is_written_at_the_start_of_a_response(name, prompt, response):
    encoder = encoder_of(name)
    (prompt_ids,) = encoder.prompts([prompt])
    (rest,) = encoder.continuations([prompt], [response])
    ids = [*prompt_ids, *rest]
    assert encoder.tokenizer.decode(ids, skip_special_tokens=True) == prompt + response
    assert prompt_ids[0] == encoder.tokenizer.bos_token_id


@pytest.mark.parametrize(
    ("name", "prompt", "expected"),
    [
        ("byte-level, bos, as Llama 3", "", ["<s>"]),
        ("byte-level, bos and eos added", "", ["<s>"]),
        ("byte-level, bos and eos added", "<s><s>b</s>", ["<s>", "b", "</s>"]),
        ("byte-level", "<s><s>b", ["<s>", "b"]),
        ("byte-level, eos around", "b</s>", ["</s>", "b", "</s>"]),
        ("metaspace first", "<s>b", ["<s>", "b"]),
        ("metaspace, no bos", "b", ["▁b"]),
        ("unigram", "", []),
    ],
)
def test_a_prompt_is_opened_once_and_not_closed(name, prompt, expected):
    encoder = encoder_of(name)
    (ids,) = encoder.prompts([prompt])
    tokens = encoder.tokenizer.convert_ids_to_tokens(ids)
    assert tokens in (expected, [t for e in expected for t in (("▁", "b") if e == "▁b" else (e,))])


@pytest.mark.parametrize(
    ("response", "kept", "of_turn"),
    [
        ("b", None, None),
        ("b\n", None, None),
        ("b</s>", "b</s>", "b</s>"),
        ("b</s></s>", "b</s>", "b</s>"),
        ("b</s>\n", "b</s>", "b</s>"),
        ("b<|im_end|>\n</s>\n", "b<|im_end|>\n</s>", "b<|im_end|>\n</s>"),
        ("b<|im_end|>\n", None, "b<|im_end|>"),
        ("b</s><pad>", "b</s>", "b</s>"),
        ("b</s>b", None, None),
        ("b<unk>", None, None),
        ("</s>", "</s>", "</s>"),
    ],
)
def test_an_end_is_the_first_eos_among_what_closes(response, kept, of_turn):
    encoder = TextEncoder(wrapped(byte_level(), unk_token="<unk>"))
    encoder.tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    (ids,) = encoder.plain([response])
    eos = encoder.tokenizer.eos_token_id
    for any_special, expected in ((False, kept), (True, of_turn)):
        end = encoder.end_of(ids, [eos], any_special=any_special)
        found = None if end is None else encoder.tokenizer.decode(ids[:end])
        assert found == expected


def test_an_eos_that_is_not_special_ends_a_response():
    backend = Tokenizer(models.WordLevel({"a": 0, "end": 1, "<unk>": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    encoder = TextEncoder(PreTrainedTokenizerFast(tokenizer_object=backend))
    assert ended([0, 1], encoder, [1]) == [0, 1]
    assert ended([1, 0], encoder, [1]) == [1, 0, 1]


@pytest.mark.parametrize("name", ["byte-level", "metaspace first", "prepend", "unigram"])
@pytest.mark.parametrize("filling", ["the cat said ", "b", " ", "é"])
def test_a_long_text_is_cut_before_it_is_tokenized(name, filling, monkeypatch):
    encoder = encoder_of(name)
    prompt, response = "He said" + filling * 4000, filling * 4000 + "yes"
    whole = [encoder.prompts([prompt])[0], encoder.continuations(["He said"], [response])[0]]
    sizes = []
    call = encoder._call
    monkeypatch.setattr(
        encoder, "_call", lambda t, **k: sizes.append(max(map(len, t))) or call(t, **k)
    )
    limit = 20
    found = [
        encoder.prompts([prompt], limit=limit)[0],
        encoder.continuations(["He said"], [response], limit=limit)[0],
    ]
    for ids, all_ids in zip(found, whole, strict=True):
        assert ids[:limit] == all_ids[:limit]
        assert (len(ids) > limit) == (len(all_ids) > limit)
    if len(filling) > 1:  # blanks and unknown characters may be one token however many they are
        longest = max(map(len, encoder.tokenizer.get_vocab()))
        assert max(sizes) <= (limit + MARGIN) * longest + len("He said") < len(prompt)


def test_a_tokenizer_that_knows_no_token_for_a_text_is_named():
    backend = Tokenizer(models.WordLevel({"a": 0}, unk_token=None))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    encoder = TextEncoder(PreTrainedTokenizerFast(tokenizer_object=backend))
    with pytest.raises(DataError, match="cannot encode all of 1 texts, such as 'b'"):
        encoder.plain(["b"])
    assert encoder.continuations(["a"], ["a"]) == [[0]]  # "aa" is no word
