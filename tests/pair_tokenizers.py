"""Tokenizers of letters and pairs of letters, which cut a text differently."""

from __future__ import annotations

import tiny
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast


def merging(*pairs: str, letters: str = tiny.LETTERS) -> PreTrainedTokenizerFast:
    """Return a tokenizer of letters and merged pairs, after <pad>, <eos> and <bos>."""
    tokens = ["<pad>", "<eos>", "<bos>", *letters, *pairs]
    model = models.BPE({t: i for i, t in enumerate(tokens)}, [tuple(pair) for pair in pairs])
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>"
    )
