"""Comparison of the data and weights that the ranks have read, before a run's first step.

Each process reads settings, data, tokenizer and models by itself. Without this check, a run would
train on silently where one of them reads something different (an old file on its node, another
version of a library, rows in another order).
"""

from __future__ import annotations

import importlib.metadata
from array import array
from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from typing import Any

import lightning
import torch
import yaml
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase

from okd_lightning.data.token_cache import tokenizer_digest
from okd_lightning.errors import DifferingRanksError
from okd_lightning.models.deferred import deferred
from okd_lightning.models.weight_files import WeightFiles
from okd_lightning.rollouts import RolloutLoader
from okd_lightning.training.config_paths import without_paths

_LIBRARIES = ("torch", "transformers", "lightning", "peft", "tokenizers", "okd-lightning")
_SAMPLES = 256
"""Compared entries of a weight: those of another model differ nearly everywhere."""


def weights_digest(models: Iterable[nn.Module | None]) -> str:
    """Digest a sample of every weight that a process has read, before ranks share theirs.

    Of weights that are left on disk the sample is of the files, of which each rank reads its rows.

    Args:
        models: Student, teacher and its base; None where there is none.
    """
    found = blake2b(digest_size=16)
    for model in models:
        for name, weight in [] if model is None else model.named_parameters():
            found.update(f"{name} {tuple(weight.shape)}".encode())
            if isinstance(weight, DTensor) or weight.is_meta or not weight.numel():
                continue
            flat = weight.detach().reshape(-1)
            found.update(_in_bytes(flat[:: max(1, flat.numel() // _SAMPLES)]))
        about = None if model is None else deferred(model)
        if about is not None:
            for name, shape, sample in WeightFiles(about.source, about.option).samples(_SAMPLES):
                found.update(f"{name} {shape}".encode())
                found.update(_in_bytes(sample))
    return found.hexdigest()


def _in_bytes(sample: Tensor) -> bytes:
    return sample.float().cpu().numpy().tobytes()


def check_ranks_agree(
    trainer: lightning.Trainer,
    weights: str,
    config: str | None,
    tokenizer: PreTrainedTokenizerBase | None,
) -> None:
    """Compare the data and weights of all ranks by one collective call; skipped for one process.

    Args:
        trainer: The Trainer of a run that is about to train.
        weights: Result of ``weights_digest`` for the run's models.
        config: The run's config as YAML; None in a run from Python.
        tokenizer: The run's tokenizer, if there is one.

    Raises:
        DifferingRanksError: On all ranks; names a rank and its differences from rank 0.
    """
    if trainer.world_size == 1:
        return
    read = {"the models' weights": weights, **_what_was_read(trainer, config, tokenizer)}
    found: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(found, read)
    for rank, own in enumerate(found):
        if differing := _differing(found[0], own):
            raise DifferingRanksError(
                f"rank {rank} has read other inputs than rank 0: {differing}; give all processes "
                "of a "
                "run the same files, versions and settings (a folder that all nodes share)"
            )


def _what_was_read(
    trainer: lightning.Trainer, config: str | None, tokenizer: PreTrainedTokenizerBase | None
) -> dict[str, str]:
    read = {}
    if config is not None:
        read["the settings"] = _digest([repr(without_paths(yaml.safe_load(config)))])
    if isinstance(loader := trainer.train_dataloader, RolloutLoader):
        rows = ((e.prompt_ids, e.teacher_prompt_ids, e.response_ids) for e in loader.examples)
        read["the training rows or their order"] = _digest_of_rows(rows)
    if tokenizer is not None:
        read["the tokenizer"] = tokenizer_digest(tokenizer).hex()
    return read | {f"the version of {name}": _version(name) for name in _LIBRARIES}


def _differing(first: Mapping[str, str], own: Mapping[str, str]) -> str:
    names = [name for name in first if first[name] != own.get(name)]
    return ", ".join(
        f"{name} ({own.get(name)}, not {first[name]})" if name.startswith("the version") else name
        for name in names
    )


def _digest_of_rows(rows: Iterable[Sequence[Sequence[int] | None]]) -> str:
    found = blake2b(digest_size=16)
    for row in rows:
        for ids in row:
            found.update(f"{-1 if ids is None else len(ids)} ".encode())
            found.update(array("q", ids or ()))
    return found.hexdigest()


def _digest(parts: Iterable[str] | Sequence[str]) -> str:
    found = blake2b(digest_size=16)
    for part in parts:
        found.update(part.encode("utf-8", "surrogatepass"))
    return found.hexdigest()


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"
