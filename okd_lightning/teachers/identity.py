"""Identity of a teacher: a digest of its config and weights, computed once for each file.

A file's digest is stored with the caches, with the file's size and modification time, so that a
second run does not read the weights again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from transformers import PreTrainedModel

from okd_lightning.durable_files import read_json, write_json
from okd_lightning.errors import ConfigError, ModelError
from okd_lightning.models import ModelSource, load_model_config
from okd_lightning.models.adapter_folders import adapter_folder
from okd_lightning.models.sources import Source, locate
from okd_lightning.models.weight_files import safetensors_in

_MEMO = "weights.json"
_BLOCK = 2**24


def teacher_identity(source: ModelSource, vocab_size: int, folder: Path) -> str:
    """Return a digest that is equal for equal weights and configs, independent of their location.

    Args:
        source: A folder (of a model, or of an adapter with its base), a hub id, or a model in
            memory.
        vocab_size: Passed to ``load_model_config``.
        folder: Folder of the files' digests.

    Raises:
        ConfigError: Random weights, which no other run has.
        ModelError: A hub id of unknown version, or a folder without weights.
    """
    if isinstance(source, PreTrainedModel):
        return _of_memory(source)
    if isinstance(source, Mapping):
        raise ConfigError(
            "--model.teacher CachedTeacher keeps log-probabilities for later runs, and its model "
            "is a config with random weights: save the model and name its folder"
        )
    found = locate(source, "--model.teacher")
    if found.folder is not None and found.gguf_file is not None:
        return _digests([found.folder / found.gguf_file], folder)[0]
    if found.folder is not None:
        return _of_folder(found, vocab_size, folder)
    version = getattr(
        load_model_config(source, "--model.teacher", vocab_size), "_commit_hash", None
    )
    if version is None:
        raise ModelError(
            f"--model.teacher {source!r}: its version is unknown, so its cache could belong to "
            "another one; download it and name the folder"
        )
    return f"{source}@{version}"


def _of_memory(model: PreTrainedModel) -> str:
    found = hashlib.sha256(model.config.to_json_string(use_diff=False).encode())
    for name, tensor in sorted(model.state_dict().items()):
        found.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        found.update(flat.view(torch.uint8).numpy().data)
    return found.hexdigest()


def _of_folder(source: Source, vocab_size: int, folder: Path) -> str:
    found = hashlib.sha256()
    teacher = Path(source.name)
    for name in ("config.json", "adapter_config.json"):
        if (teacher / name).is_file():
            found.update((teacher / name).read_bytes())
    adapter = adapter_folder(source, "--model.teacher")
    files = safetensors_in(teacher) if adapter is None else [adapter.weights]
    if not files:
        raise ModelError(
            f"--model.teacher {str(teacher)!r}: no safetensors in this folder; give one with the "
            "teacher's weights"
        )
    for digest in _digests(files, folder):
        found.update(digest.encode())
    if adapter is not None:
        found.update(teacher_identity(adapter.base, vocab_size, folder).encode())
    return found.hexdigest()


def _digests(files: Iterable[Path], folder: Path) -> list[str]:
    """Return each file's digest, from the memo if size and modification time are the same."""
    memo = folder / _MEMO
    try:
        known = read_json(memo) if memo.is_file() else {}
    except json.JSONDecodeError:
        known = {}
    digests = []
    for file in files:
        about = file.stat()
        stamp = [about.st_size, about.st_mtime_ns]
        name = str(file.resolve())
        if name not in known or known[name]["stamp"] != stamp:
            known[name] = {"stamp": stamp, "digest": _of_file(file)}
            write_json(memo, known)
        digests.append(known[name]["digest"])
    return digests


def _of_file(file: Path) -> str:
    found = hashlib.sha256()
    with file.open("rb") as content:
        while block := content.read(_BLOCK):
            found.update(block)
    return found.hexdigest()
