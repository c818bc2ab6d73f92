"""Bytes of a tokenizer's ids, read from its vocabulary.

Two models with different tokenizers have the text in common, as bytes. Character offsets cannot
give them: several tokens may lie within one character. Owns the two alphabets in use: byte-level
BPE (GPT-2, Qwen, Llama 3), where each of 256 characters is a byte, and sentencepiece (Llama 2,
Gemma), with ``▁`` for a space and ``<0xNN>`` for a byte.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from okd_lightning.errors import VocabularyError

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "▁"
_PLAIN_STEPS = {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}
"""Decoder steps that change neither the order of tokens nor the text within them."""


class TokenBytes:
    """The bytes of every id of a tokenizer.

    Args:
        tokenizer: A fast one.
        option: How the user named its model, for messages.

    Attributes:
        pieces: Bytes by id; None for an id without text: special, unknown or unused.
        opening: Bytes that the first token of a text has and the text has not: a space, for a
            sentencepiece tokenizer that marks the beginning of a text.

    Raises:
        VocabularyError: Its tokens cannot be read as bytes; the message names the decoder.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, option: str) -> None:
        steps = list(_steps(_decoder(tokenizer, option)))
        kinds = {str(step["type"]) for step in steps}
        self._is_byte_level = "ByteLevel" in kinds
        if not kinds or (not self._is_byte_level and not kinds <= _PLAIN_STEPS):
            raise VocabularyError(
                f"{option}: its tokenizer has the decoder {', '.join(sorted(kinds)) or 'none'}, "
                "whose tokens cannot be read as bytes, and a teacher with another tokenizer is "
                "compared by bytes; expected byte-level BPE or sentencepiece"
            )
        self._has_bytes = "ByteFallback" in kinds
        self._marks_spaces = "Metaspace" in kinds or any(
            step["type"] == "Replace" and step["pattern"] == {"String": _SPACE} for step in steps
        )
        drops_first = "Metaspace" in kinds or any(
            step["type"] == "Strip" and step["content"] == " " and step["start"] for step in steps
        )
        self.opening = b" " if self._marks_spaces and drops_first else b""
        self.pieces = self._pieces(tokenizer)

    def _pieces(self, tokenizer: PreTrainedTokenizerBase) -> tuple[bytes | None, ...]:
        added = tokenizer.added_tokens_decoder
        special = {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
        special.add(tokenizer.unk_token_id)
        vocabulary = tokenizer.get_vocab()
        found: list[bytes | None] = [None] * (max(vocabulary.values()) + 1)
        for token, i in vocabulary.items():
            if i not in special:
                found[i] = token.encode() if i in added else self._piece(token)
        return tuple(found)

    def _piece(self, token: str) -> bytes | None:
        if self._is_byte_level:
            if not all(character in _ALPHABET for character in token):
                return None
            return bytes(_ALPHABET[character] for character in token) or None
        byte = _BYTE.fullmatch(token) if self._has_bytes else None
        if byte is not None:
            return bytes([int(byte[1], 16)])
        return (token.replace(_SPACE, " ") if self._marks_spaces else token).encode() or None


def _decoder(tokenizer: PreTrainedTokenizerBase, option: str) -> Mapping[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise VocabularyError(
            f"{option}: {type(tokenizer).__name__} is not a fast tokenizer, and a teacher with "
            "another tokenizer is compared by the bytes of its tokens; give a model with a "
            "tokenizer.json"
        )
    return dict(json.loads(backend.decoder.__getstate__())) if backend.decoder else {}


def _steps(decoder: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield a decoder's steps, those of sequences within sequences too."""
    if decoder.get("type") == "Sequence":
        for step in decoder["decoders"]:
            yield from _steps(step)
    elif decoder:
        yield decoder


def _byte_alphabet() -> dict[str, int]:
    """Return the byte of each character of byte-level BPE (GPT-2's bytes_to_unicode, reversed)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    shown = {chr(byte): byte for byte in printable}
    return {**shown, **{chr(256 + place): byte for place, byte in enumerate(others)}}


_ALPHABET = _byte_alphabet()
