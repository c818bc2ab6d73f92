"""GGUF files: the package that reads them, and models that are plain again after loading.

transformers converts config, tokenizer and weights; here are the demand for its optional package
and the removal of what marks the loaded model as quantised. Weights are unpacked to the number
format that was asked for, so that such a model is trained, saved and adapted as any other.
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
    """Refuse a GGUF file where the package that reads it is not installed.

    Raises:
        ModelError: Naming the package.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(
            f"{option} {source!r}: GGUF files are read with the package gguf, which is not "
            "installed; pip install gguf, or give a folder of safetensors"
        )


def unpacking(gguf_file: str | None) -> dict[str, Any]:
    """What ``from_pretrained`` is told so that no weight stays in GGUF blocks."""
    config = getattr(transformers, "GgufConfig", None)  # older versions always unpack
    if gguf_file is None or config is None:
        return {}
    return {"quantization_config": config(dequantize=True)}


def as_unpacked(model: PreTrainedModel) -> PreTrainedModel:
    """The model without the marks of a quantised one, in place."""
    for mark in _MARKS:
        model.__dict__.pop(mark, None)
    model.config.__dict__.pop("quantization_config", None)
    return model
