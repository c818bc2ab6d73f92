"""GGUF files: the package that reads them, and their conversion to plain models.

transformers converts config, tokenizer and weights. Owns the check for its optional package, and
the removal of the attributes that mark the loaded model as quantised. Weights are dequantised to
the requested number format, so that the model is trained, saved and adapted like any other.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import transformers
from transformers import PreTrainedModel

from okd_lightning.errors import ModelError

SUFFIX = ".gguf"
_MARKS = ("hf_quantizer", "is_quantized", "quantization_method", "_weight_conversions")


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
