"""Bytes of a tokenizer's ids.

Frozen here: the pieces of a text's ids are its bytes, for byte-level and sentencepiece tokenizers;
special and unknown ids have none; the space before a text is no part of it; a tokenizer whose
tokens are no bytes is refused with its decoder's name.
"""

from __future__ import annotations

import pytest
import tiny
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from okd_lightning.errors import VocabularyError
from okd_lightning.models.token_bytes import TokenBytes

TEXT = "Lily's naïve café — 12€!\n\t中文 ✓"


def trained(decoder, pre_tokenizer=None, normalizer=None, alphabet=(), extra=()):
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoder
    tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "<s>", *extra],
        initial_alphabet=list(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["Lily has a naive cafe, Lily said."] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>")


def byte_level():
    return trained(
        decoders.ByteLevel(),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )


def sentencepiece():
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    return trained(
        decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)]),
        normalizer=normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        extra=[f"<0x{byte:02X}>" for byte in range(256)],
    )


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_pieces_of_a_text_are_its_bytes(make):
    tokenizer = make()
    if make is sentencepiece:  # its byte tokens are content, as in a converted model
        tokenizer.add_tokens([])
    known = TokenBytes(tokenizer, "--model.teacher")
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    found = [known.pieces[i] for i in ids]
    if make is sentencepiece:
        found = [
            bytes([i - 2]) if piece is None else piece for i, piece in zip(ids, found, strict=True)
        ]
    assert b"".join(found) == known.opening + TEXT.encode()
    assert known.opening == (b" " if make is sentencepiece else b"")


def test_special_and_unknown_ids_have_no_bytes():
    tokenizer = byte_level()
    tokenizer.add_tokens(["<think>"])
    known = TokenBytes(tokenizer, "--model.teacher")
    assert known.pieces[tokenizer.unk_token_id] is None
    assert known.pieces[tokenizer.bos_token_id] is None
    assert known.pieces[tokenizer.convert_tokens_to_ids("<think>")] == b"<think>"


def test_letters_are_themselves():
    known = TokenBytes(tiny.make_tokenizer(), "--model.student")
    assert known.pieces == (None, None, None, *(letter.encode() for letter in tiny.LETTERS))


@pytest.mark.parametrize("decoder", [decoders.WordPiece(), decoders.BPEDecoder(), None])
def test_other_tokenizers_are_refused_with_their_decoder(decoder):
    name = type(decoder).__name__ if decoder is not None else "none"
    with pytest.raises(VocabularyError, match=rf"--model\.teacher: .*the decoder {name}"):
        TokenBytes(trained(decoder, pre_tokenizers.Whitespace()), "--model.teacher")
