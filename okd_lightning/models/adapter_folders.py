"""PEFT folders: a folder or hub id with adapter_config.json, and the base that it names.

Owns finding the base, checking that the adapter is complete, and merging it. The result is a plain
model: a teacher is frozen as usual, and a student trains all merged weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from okd_lightning.bounded_files import read_json_object
from okd_lightning.errors import ConfigError, ModelError, ModelNotFoundError
from okd_lightning.models.adapters import adapter_sizes
from okd_lightning.models.merging import merge_adapters, unfit_adapter
from okd_lightning.models.sources import Source, first_line
from okd_lightning.models.weight_checks import is_finite, is_quantised, not_finite
from okd_lightning.models.weight_files import INDEX, SINGLE, read_safetensors_error
from okd_lightning.models.wrapped_names import wrapper_advice

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"
_PREFIX = "base_model.model."
_TABLES = ("embed_tokens", "lm_head", "wte", "word_embeddings", "embed_in", "embed_out")
"""Last names of layers that PEFT saves completely if their number of rows was changed."""


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter on disk.

    Attributes:
        source: Its location.
        where: Option and folder, for messages.
        config: Its PEFT config.
        base: The model it was trained on, as for ``--model.teacher``.
        weights: Its safetensors file.
    """

    source: Source
    where: str
    config: PeftConfig
    base: str
    weights: Path


def adapter_folder(source: Source, option: str) -> AdapterFolder | None:
    """Return the adapter at a location; None for a plain model.

    Raises:
        ModelError: A broken adapter_config.json, one that names no base, pickled weights, or a
            folder that also holds a whole model.
        ModelNotFoundError: A hub id that cannot be reached.
    """
    if source.gguf_file is not None:
        return None
    where = f"{option} {source.given!r}"
    path = source.file(CONFIG)
    if path is None:
        return None
    _check_alone(source, where)
    config = _read_config(path, source, where)
    if config.is_prompt_learning:
        raise ModelError(
            f"{where} is a prompt-learning adapter, which cannot be merged into its base; use a "
            "LoRA module, or the base itself"
        )
    unfit = unfit_adapter(config)
    if unfit is not None:
        raise ModelError(f"{where}: {unfit}")
    weights = source.file(WEIGHTS)
    if weights is None:
        pickled = source.file(_PICKLE) is not None
        raise ModelError(
            f"{where}: "
            + (
                f"the adapter's weights are pickled ({_PICKLE}) and not safetensors, the only "
                "format that is read; load it with PEFT and save it again"
                if pickled
                else f"{CONFIG} is there, but its weights ({WEIGHTS}) are not; copy both"
            )
        )
    return AdapterFolder(source, where, config, _base_of(config, source, where), weights)


@contextmanager
def naming_base(adapter: AdapterFolder) -> Iterator[None]:
    """Within the context, report a base that is not found with the file that names it.

    Raises:
        ModelNotFoundError: The block raised one; the message names the adapter too.
    """
    try:
        yield
    except ModelNotFoundError as error:
        raise ModelNotFoundError(
            f"{error}; it is the base of the adapter {adapter.source.given!r} "
            f"(base_model_name_or_path in its {CONFIG}): write where the base is now there"
        ) from error


def adapted_config(adapter: AdapterFolder, base: PretrainedConfig) -> PretrainedConfig:
    """Return the base's config with the adapter's number of embedding rows.

    Raises:
        ModelError: The adapter's file cannot be opened.
    """
    rows = _saved_rows(adapter, base.get_text_config().hidden_size)
    if rows is None or rows == base.get_text_config().vocab_size:
        return base
    config = deepcopy(base)
    config.get_text_config().vocab_size = rows
    return config


def merge_into_base(adapter: AdapterFolder, base: PreTrainedModel) -> PreTrainedModel:
    """Merge an adapter into its base, in place.

    Args:
        adapter: The adapter, with saved modules and resized embeddings.
        base: A plain model. PEFT's random initialisation does not change torch's random state.

    Returns:
        ``base`` without any adapter, with requires_grad on for all parameters.

    Raises:
        ModelError: A quantised base, or an adapter that is broken, incomplete or of another base.
    """
    where = adapter.where
    if is_quantised(base):
        raise ModelError(
            f"{where}: its base {adapter.base!r} is quantised, and an adapter cannot be merged "
            f"into it without a loss; name the unquantised base in its {CONFIG}"
        )
    weights = _read_weights(adapter)
    broken = [name for name, value in weights.items() if not is_finite(value)]
    if broken:
        raise ModelError(not_finite(broken, where))
    number_format = base.dtype
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's advice for further training of the adapter
        _resize(base, weights)
        try:
            with adapter_sizes(base):
                adapted = PeftModel(base, adapter.config)
            result: Any = set_peft_model_state_dict(adapted, weights)
        except (ArithmeticError, ValueError, RuntimeError, KeyError, TypeError) as error:
            raise ModelError(
                f"{where}: the adapter does not fit its base {adapter.base!r}: {_reason(error)}"
            ) from error
    own = [name for name, _ in adapted.named_parameters() if ".default" in name]
    _check_complete(adapter, own, result.missing_keys, result.unexpected_keys)
    plain = cast(PreTrainedModel, adapted.get_base_model())
    try:
        is_taken_apart = merge_adapters(plain)
    except ConfigError as error:
        raise ModelError(f"{where}: {error}") from error
    if is_taken_apart:
        plain.config.tie_word_embeddings = False
    if hasattr(plain, "peft_config"):
        del plain.peft_config
    cast(nn.Module, plain).to(number_format)  # saved modules are in float32
    return plain.requires_grad_(True).eval()


def _check_alone(source: Source, where: str) -> None:
    folder = source.folder
    whole = [n for n in (SINGLE, INDEX) if folder is not None and (folder / n).is_file()]
    if whole:
        raise ModelError(
            f"{where} holds an adapter ({CONFIG}) and a whole model ({whole[0]}): it is unclear "
            "which one is meant; move one of them to a folder of its own"
        )


def _read_config(path: Path, source: Source, where: str) -> PeftConfig:
    read_json_object(path, ModelError, f"{where}: {CONFIG} cannot be read")
    try:
        return PeftConfig.from_pretrained(source.name, revision=source.revision)
    except Exception as error:
        raise ModelError(f"{where}: {CONFIG} cannot be read: {first_line(error)}") from error


def _base_of(config: PeftConfig, source: Source, where: str) -> str:
    named = config.base_model_name_or_path
    if not named:
        raise ModelError(
            f"{where}: {CONFIG} names no base (base_model_name_or_path is empty); write the folder "
            "or hub id of the base there"
        )
    base = _local_base(str(named), source.folder)
    if source.folder is not None and Path(base).resolve() == source.folder.resolve():
        raise ModelError(
            f"{where}: {CONFIG} names the adapter's own folder as its base "
            "(base_model_name_or_path); write the folder or hub id of the base there"
        )
    is_hub_id = not Path(base).exists()
    return f"{base}@{config.revision}" if config.revision and is_hub_id else base


def _local_base(named: str, folder: Path | None) -> str:
    """Resolve a relative path from the working folder, then from the adapter's folder upwards."""
    if Path(named).expanduser().exists() or Path(named).is_absolute() or folder is None:
        return named
    for start in (folder.resolve(), *folder.resolve().parents):
        candidate = start / named
        if (candidate / "config.json").is_file() or (candidate / CONFIG).is_file():
            return str(candidate.resolve())
        if candidate.is_file():
            return str(candidate.resolve())
    return named


def _saved_rows(adapter: AdapterFolder, hidden_size: int) -> int | None:
    """Return the rows of an embedding or head in the adapter's file; None if it has neither."""
    try:
        with safe_open(adapter.weights, framework="pt") as opened:
            names = list(opened.keys())
            shapes = {name: opened.get_slice(name).get_shape() for name in names}
    except (SafetensorError, OSError) as error:
        reason = read_safetensors_error(adapter.weights, error)
        raise ModelError(f"{adapter.where}: {reason}") from error
    for name, shape in shapes.items():
        layer = name.removesuffix(".weight").rsplit(".", 1)[-1]
        if layer in _TABLES and len(shape) == 2 and shape[1] == hidden_size:
            return int(shape[0])
    return None


def _read_weights(adapter: AdapterFolder) -> dict[str, Tensor]:
    try:
        return load_file(adapter.weights)
    except (SafetensorError, OSError) as error:
        reason = read_safetensors_error(adapter.weights, error)
        raise ModelError(f"{adapter.where}: {reason}") from error


def _resize(base: PreTrainedModel, weights: dict[str, Tensor]) -> None:
    """Resize the base to the adapter's number of rows, whose values the adapter has."""
    names = {id(module): name for name, module in base.named_modules()}
    tables = (base.get_input_embeddings(), base.get_output_embeddings())
    for table in tables:
        saved = weights.get(f"{_PREFIX}{names.get(id(table))}.weight")
        if saved is not None and len(saved) != len(cast(Tensor, table.weight)):
            base.resize_token_embeddings(len(saved), mean_resizing=False)
            return


def _check_complete(
    adapter: AdapterFolder, own: list[str], missing: list[str], unexpected: list[str]
) -> None:
    """Refuse an adapter that lacks weights, or has weights for layers that the base lacks."""
    lacking = sorted(set(own).intersection(missing))
    if lacking:
        advice = wrapper_advice(unexpected, lacking) or "copy or download the folder again"
        raise ModelError(
            f"{adapter.where}: {WEIGHTS} lacks {len(lacking)} of the adapter's {len(own)} weights "
            f"(such as {lacking[0]}); {advice}"
        )
    if unexpected:
        raise ModelError(
            f"{adapter.where}: {len(unexpected)} of the adapter's weights have no place in its "
            f"base {adapter.base!r} (such as {sorted(unexpected)[0]}); it was trained on another "
            "model"
        )


def _reason(error: Exception) -> str:
    """Return the line that names a size mismatch, else the first line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if "size mismatch" in line), first_line(error))
