"""GGUF files: the package that reads them, and their conversion to plain models.

transformers converts config, tokenizer and weights. Owns the check for its optional package, the
removal of the attributes that mark the loaded model as quantised, and the tokenizer's split of a
text before its merges, which transformers does not read. Weights are dequantised to the requested
number format, so that the model is trained, saved and adapted like any other.
"""

from __future__ import annotations

import importlib.util
import struct
from pathlib import Path
from typing import Any

import transformers
from lightning.pytorch.utilities import rank_zero_warn
from tokenizers import Regex, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from okd_lightning.errors import ModelError

SUFFIX = ".gguf"
_MARKS = ("hf_quantizer", "is_quantized", "quantization_method", "_weight_conversions")

_SPLIT_KEY = b"tokenizer.ggml.pre"
_HEAD_BYTES = 2**26
"""Bytes at a file's start that hold its settings: 262,144 tokens with their scores are 6 MiB."""

_LONGEST_NAME = 64
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {  # llama.cpp's names; source: its llama-vocab.cpp
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "dbrx", "smaug-bpe"), r"\p{N}{1,3}"),
    **dict.fromkeys(("qwen2", "stablelm2", "deepseek-r1-qwen"), r"\p{N}"),
}
_SINGLE_DIGITS = (
    *("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"),
    "minerva-7b",
)
_AS_GPT2 = ("gpt-2", "phi-2", "mpt", "olmo", "jais", "default", "")


def require_gguf(source: str, option: str) -> None:
    """Refuse a GGUF file if the package that reads it is not installed.

    Raises:
        ModelError: It is not installed; the message names the package.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(
            f"{option} {source!r}: GGUF files are read with the package gguf, which is not "
            "installed; pip install gguf, or give a folder of safetensors"
        )


def unpacking(gguf_file: str | None) -> dict[str, Any]:
    """Return the ``from_pretrained`` arguments that dequantise all weights of a GGUF file."""
    config = getattr(transformers, "GgufConfig", None)  # older versions always dequantise
    if gguf_file is None or config is None:
        return {}
    return {"quantization_config": config(dequantize=True)}


def as_unpacked(model: PreTrainedModel) -> PreTrainedModel:
    """Remove, in place, the attributes that mark a model as quantised, and return it."""
    for mark in _MARKS:
        model.__dict__.pop(mark, None)
    model.config.__dict__.pop("quantization_config", None)
    return model


def restore_split(tokenizer: PreTrainedTokenizerBase, path: Path, option: str) -> None:
    """Restore, in place, how a GGUF file's tokenizer splits a text before its merges.

    transformers gives byte-level tokenizers of several architectures GPT-2's split. SmolLM2's, for
    example, separates digits first, so that "x  12" would get other ids than the model has read.

    Args:
        tokenizer: As transformers has read it.
        path: The file.
        option: How the user named it, for messages.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel):
        return
    name = _split_name(path)
    if name in _SINGLE_DIGITS:
        first: Any = pre_tokenizers.Digits(individual_digits=True)
        is_split = False
    elif name in _SPLITS:
        pattern = Regex(f"{_WORDS}|{_SPLITS[name]}|{_REST}")
        first, is_split = pre_tokenizers.Split(pattern, "isolated"), True
    else:
        if name not in _AS_GPT2:
            rank_zero_warn(
                f"{option} {str(path)!r}: its tokenizer splits texts by the rule {name!r}, which "
                "cannot be read from a GGUF file; GPT-2's is used, and some texts get other ids "
                "than in the model's training: give the tokenizer of its original folder with "
                "--model.tokenizer"
            )
        return
    rest = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not is_split)
    backend.pre_tokenizer = pre_tokenizers.Sequence([first, rest])


def _split_name(path: Path) -> str:
    """Return the file's name of the split; "" where it has none.

    The package gguf would read all tokens and tensors first, which takes seconds.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    # length of the key, key, and 8: its value is a text
    key = struct.pack("<Q", len(_SPLIT_KEY)) + _SPLIT_KEY + struct.pack("<I", 8)
    start = head.find(key)
    if start < 0:
        return ""
    start += len(key)
    length = int.from_bytes(head[start : start + 8], "little")
    return head[start + 8 : start + 8 + min(length, _LONGEST_NAME)].decode("utf-8", "replace")
