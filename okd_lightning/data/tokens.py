"""Text to token ids, many texts at a time.

Owns what tokenizers do unasked: closing specials behind a prompt, the prefix space that some write
at the start of every text, and the warning about long texts.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_TEXTS_PER_CALL = 1024


def encode_texts(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, add_special_tokens: bool = False
) -> list[list[int]]:
    """Token ids of each text, never cut or padded; special tokens in the text are parsed."""
    ids: list[list[int]] = []
    for start in range(0, len(texts), _TEXTS_PER_CALL):
        encoded = tokenizer(
            list(texts[start : start + _TEXTS_PER_CALL]),
            add_special_tokens=add_special_tokens,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            verbose=False,  # no warning about model_max_length: our own limits come later
        )
        ids.extend(encoded["input_ids"])
    return ids


def _num_closing_specials(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many special tokens (an eos, a separator) the tokenizer writes behind a text."""
    bare = encode_texts(tokenizer, ["a"])[0]
    full = encode_texts(tokenizer, ["a"], add_special_tokens=True)[0]
    for num_opening in range(len(full) - len(bare) + 1):
        if full[num_opening : num_opening + len(bare)] == bare:
            return len(full) - len(bare) - num_opening
    return 0


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of plain prompts: with the tokenizer's bos where it adds one, without an eos."""
    num_closing = _num_closing_specials(tokenizer)
    encoded = encode_texts(tokenizer, prompts, add_special_tokens=True)
    return [ids[: len(ids) - num_closing] for ids in encoded]


def _find_anchor(tokenizer: PreTrainedTokenizerBase) -> str:
    """A special token that is one id and leaves the text behind it alone; empty where none is."""
    for token_id, token in tokenizer.added_tokens_decoder.items():
        is_neutral = token.special and not token.rstrip and not token.single_word
        if is_neutral and encode_texts(tokenizer, [token.content]) == [[token_id]]:
            return token.content
    return ""


def encode_continuations(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]
) -> list[list[int]]:
    """Token ids of texts that stand in the middle of a longer one.

    SentencePiece-like tokenizers write a space at the start of a text, which the middle of a text
    does not have; a special token in front, dropped afterwards, keeps it away.
    """
    anchor = _find_anchor(tokenizer)
    if not anchor:
        return encode_texts(tokenizer, texts)
    return [ids[1:] for ids in encode_texts(tokenizer, [anchor + text for text in texts])]
