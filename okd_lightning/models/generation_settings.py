"""Writing a model with its generation settings as they were loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

_FILE = "generation_config.json"
_NOT_SETTINGS = ("transformers_version", "_from_model_config")


def save_with_settings(model: PreTrainedModel, folder: Path, **ids: Any) -> None:
    """Write a model; its generation settings stay, except those given here.

    transformers loads settings that it then refuses to save, such as a temperature without
    ``do_sample``. Other programs use them (vLLM samples by them), so they are written
    unchanged.

    Args:
        model: The model; its ``generation_config`` is replaced.
        folder: The folder to write.
        **ids: Settings to change: ``eos_token_id`` and others.
    """
    known = {} if model.generation_config is None else model.generation_config.to_diff_dict()
    settings = {name: value for name, value in known.items() if name not in _NOT_SETTINGS}
    model.generation_config = GenerationConfig()
    model.save_pretrained(folder)
    if (folder / _FILE).is_file():  # a PEFT folder has none
        GenerationConfig(**(settings | ids)).to_json_file(folder / _FILE)
