"""The student's weights for an external engine: their label, and a folder that it can load."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from okd_lightning.errors import ConfigError, OutputError
from okd_lightning.models import merged_copy

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def weights_label(model: PreTrainedModel) -> str:
    """Return a hash of all names, shapes, types and sums of the weights' bits.

    It is computed from the weights themselves, so that no change is missed, on any rank and after a
    resume.

    Raises:
        ConfigError: The weights are sharded over processes.
    """
    state: dict[str, Tensor] = model.state_dict()
    if any(isinstance(tensor, DTensor) for tensor in state.values()):
        raise ConfigError(
            "the student's weights are sharded over processes, and model.engine sends whole ones: "
            "leave model.engine out, so that the built-in engine generates"
        )
    sums = []
    for tensor in state.values():
        bits = tensor.detach().contiguous().view(_INTEGERS[tensor.element_size()]).flatten()
        sums.append(torch.stack([bits.sum(dtype=torch.int64), bits[::2].sum(dtype=torch.int64)]))
    numbers = torch.stack(sums).tolist()
    found = blake2b(digest_size=10)
    for (name, tensor), pair in zip(state.items(), numbers, strict=True):
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {pair}".encode())
    return f"okd-{found.hexdigest()}"


@contextmanager
def _without_progress_bar() -> Iterator[None]:
    """Within the context, hide transformers' progress bar: weights are written at every step."""
    was_shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_shown:
            transformers_logging.enable_progress_bar()


def shares_table(model: PreTrainedModel) -> bool:
    """Return whether embedding and head are one table (``tie_word_embeddings``)."""
    return bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))


def _untie(plain: PreTrainedModel) -> dict[str, Tensor]:
    """Set ``tie_word_embeddings`` to False, and return the state with a separate head."""
    for config in (plain.config, plain.config.get_text_config()):
        config.tie_word_embeddings = False
    head = plain.get_output_embeddings()
    (name,) = (name for name, module in plain.named_modules() if module is head)
    state: dict[str, Tensor] = plain.state_dict()
    return {**state, f"{name}.weight": head.weight.detach().clone()}


def write_weights(model: PreTrainedModel, folder: Path, *, is_untied: bool = False) -> Path:
    """Write a plain model, adapters merged, as a Hugging Face folder.

    Args:
        model: The model; not changed.
        folder: Deleted and created again.
        is_untied: Write a shared table twice, for an engine that keeps two: vLLM on CPUs computes
            with a packed copy of the head, which it updates only if the head itself is loaded.

    Raises:
        OutputError: The folder cannot be written.
        ConfigError: See ``merged_copy``.
    """
    plain: Any = merged_copy(model)
    state = _untie(plain) if is_untied and shares_table(model) else None
    # transformers writes on the first rank only; here the rank that holds the lock writes
    plain.should_save_on_this_rank = lambda is_main_process: is_main_process
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        with _without_progress_bar():
            plain.save_pretrained(folder, state_dict=state)
    except OSError as error:
        raise OutputError(
            f"model.engine: {str(folder)!r} cannot be written ({error.strerror or error}); choose "
            "another sync_folder"
        ) from error
    if not any(folder.glob("*.safetensors")):
        raise OutputError(f"model.engine: no weights were written to {str(folder)!r} by this rank")
    return folder.resolve()
