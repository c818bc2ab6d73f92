"""Loading of a causal LM from a folder, a hub id or a config, with one-line errors.

Owns the accepted sources (safetensors only, no remote code) and number formats. Does not own
devices or sharding: models are returned on the CPU, in eval mode, with requires_grad as loaded.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from peft import PeftModel
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from okd_lightning.errors import ConfigError, ModelError, ModelNotFoundError
from okd_lightning.models.adapter_folders import (
    AdapterFolder,
    adapted_config,
    adapter_folder,
    merge_into_base,
    naming_base,
)
from okd_lightning.models.deferred import (
    causal_lm_without_weights,
    deferred_weights,
    is_deferred,
)
from okd_lightning.models.gguf_files import as_unpacked, restore_split, unpacking
from okd_lightning.models.multimodal import auto_class
from okd_lightning.models.sources import (
    ModelArgument,
    ModelSource,
    Source,
    first_line,
    locate,
    unreachable,
)
from okd_lightning.models.weight_checks import (
    Learns,
    check_loaded,
    check_stored_formats,
    check_values,
    note_untied,
    without_load_report,
)
from okd_lightning.models.weight_files import WeightFiles

DTypeName: TypeAlias = Literal["float32", "bfloat16", "float16", "float64"]

UNREADABLE = (Exception,)
"""Errors that transformers raises for a broken config, tokenizer or weights.

Any type occurs: tokenizers raises plain ``Exception``, deep nesting a ``RecursionError``, and a
wrong type in a config the error of its first use. --debug shows the original error.
"""

_SIZES = ("num_hidden_layers", "hidden_size", "vocab_size")

_TOKENIZER_FILES = (
    "tokenizer_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "spiece.model",
)


def check_precision(precision: str) -> None:
    """Refuse Lightning's "true" precisions: models are loaded in their own number format.

    Raises:
        ConfigError: A "true" precision; the message names the alternatives.
    """
    if precision.endswith("-true") and precision != "32-true":
        raise ConfigError(
            f"trainer.precision {precision} would convert batches and losses as well; give "
            "--trainer.precision bf16-mixed (and --model.teacher_dtype bfloat16), or load the "
            "weights themselves in bfloat16 with --model.dtype bfloat16"
        )


def dtype_of(source: ModelArgument | None, asked: DTypeName) -> DTypeName:
    """Return the number format of a model's weights: a loaded model keeps its own."""
    if not isinstance(source, PreTrainedModel | PeftModel):
        return asked
    return cast(DTypeName, str(source.dtype).removeprefix("torch."))


def load_model_config(source: ModelSource, option: str, vocab_size: int) -> PretrainedConfig:
    """Return the configuration of a model, without its weights.

    Args:
        source: Folder, file or hub id (see ``locate``), config mapping (``model_type`` and the
            fields of that architecture) or a loaded model.
        option: How the user named it, for messages, such as ``--model.student``.
        vocab_size: Used by a config mapping that does not give its own.

    Raises:
        ModelNotFoundError: No such folder or hub id.
        ModelError: A config mapping without a known ``model_type``, or a broken PEFT folder.
    """
    if isinstance(source, PreTrainedModel):
        return source.config
    if isinstance(source, Mapping):
        return _config_from_mapping(dict(source), option, vocab_size)
    found = locate(source, option)
    adapter = adapter_at(found, option)
    if adapter is not None:
        with naming_base(adapter):
            base = load_model_config(adapter.base, option, vocab_size)
        return adapted_config(adapter, base)
    try:
        config = AutoConfig.from_pretrained(found.name, **found.arguments)
    except UNREADABLE as error:
        raise unreachable(found, option, "model", error) from error
    for name in _SIZES:
        size = getattr(config.get_text_config(), name, None)
        if isinstance(size, int) and size < 1:
            raise ModelError(f"{option} {found.given!r}: config.json has {name} {size}")
    return config


def load_tokenizer(source: str, option: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder, file or hub id; of an adapter without one, its base's.

    Raises:
        ModelNotFoundError: No such folder or hub id, or no tokenizer in it.
    """
    found = locate(source, option)
    adapter = adapter_at(found, option)
    if adapter is not None and not any(found.file(name) for name in _TOKENIZER_FILES):
        with naming_base(adapter):
            return load_tokenizer(adapter.base, option)
    try:
        tokenizer = AutoTokenizer.from_pretrained(found.name, **found.arguments)
    except UNREADABLE as error:
        raise unreachable(found, option, "tokenizer", error) from error
    path = found.file(found.gguf_file) if found.gguf_file is not None else None
    if path is not None:
        restore_split(tokenizer, path, option)
    return tokenizer


def load_causal_lm(
    source: ModelSource,
    config: PretrainedConfig,
    option: str,
    *,
    dtype: DTypeName = "float32",
    attn_implementation: str | None = None,
    learns: Learns = "nothing",
) -> PreTrainedModel:
    """Load a causal LM, or create one with random weights if ``source`` is a config mapping.

    Args:
        source: Source of ``config``. A PEFT folder gives its base with the adapter merged, a GGUF
            file its weights dequantised.
        config: From ``load_model_config``.
        option: How the user named it, for messages.
        dtype: Number format of the weights.
        attn_implementation: Such as "sdpa" or "flash_attention_2"; None lets transformers choose.
        learns: Which part is trained: quantised weights cannot be.

    Raises:
        ModelError: Weights that are missing, broken, not finite, not safetensors, or that do not
            fit the architecture.
    """
    if isinstance(source, PreTrainedModel):  # keeps its number format and attention kernel
        check_values(source, option, learns)
        return source
    number_format = getattr(torch, dtype)
    if isinstance(source, Mapping):
        with _enough_memory(option):
            return auto_class(config).from_config(
                config, dtype=number_format, attn_implementation=attn_implementation
            )
    found = locate(source, option)
    adapter = adapter_at(found, option)
    if adapter is not None:
        with naming_base(adapter), deferred_weights(False):
            base_config = load_model_config(adapter.base, option, 0)
            base = load_causal_lm(
                adapter.base,
                base_config,
                option,
                dtype=dtype,
                attn_implementation=attn_implementation,
                learns=learns,
            )
        return merge_into_base(adapter, base)
    if is_deferred() and found.gguf_file is None:
        return causal_lm_without_weights(
            found,
            config,
            option,
            dtype=number_format,
            attn_implementation=attn_implementation,
            learns=learns,
        )
    return weights_from_files(found, config, option, number_format, attn_implementation, learns)


def weights_from_files(
    found: Source,
    config: PretrainedConfig,
    option: str,
    number_format: torch.dtype | Literal["auto"],
    attn_implementation: str | None,
    learns: Learns,
    kind: Any = None,
    named: str = "causal language model",
) -> PreTrainedModel:
    """Load a model with exactly the weights of its files.

    Args:
        found: Location of the files; not an adapter.
        config: The model's config.
        option: How the user named it, for messages.
        number_format: Of the weights; "auto" for that of the files.
        attn_implementation: None lets transformers choose.
        learns: Which part is trained.
        kind: The auto class of transformers that builds the model; None chooses by the config.
        named: The kind of model, for messages.

    Raises:
        ModelError: See ``load_causal_lm``.
    """
    where = f"{option} {found.given!r}"
    is_local = found.folder is not None and found.gguf_file is None
    files = WeightFiles(found, option) if is_local else None  # raises our errors for broken files
    if files is not None:
        files.check_sizes(config)
    try:
        with without_load_report():
            loaded: Any = (kind or auto_class(config)).from_pretrained(
                found.name,
                config=config,
                dtype=number_format,
                attn_implementation=attn_implementation,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # check_loaded refuses them in one line
                output_loading_info=True,
                **found.arguments,
                **unpacking(found.gguf_file),
            )
    except UNREADABLE as error:
        if found.folder is None and isinstance(error, OSError):
            raise unreachable(found, option, "model", error) from error
        raise ModelError(
            f"{where}: the weights could not be loaded as a {named} "
            f"(safetensors are needed): {first_line(error)}"
        ) from error
    model, info = cast("tuple[PreTrainedModel, dict[str, Any]]", loaded)
    check_loaded(model, info, where)
    note_untied(model)
    if found.gguf_file is not None:
        model = as_unpacked(model)
    else:
        files = files or WeightFiles(_downloaded(found), option)
        check_stored_formats(model, files, where, learns, info["unexpected_keys"])
    check_values(model, where, learns)
    return model


def _downloaded(found: Source) -> Source:
    """Return the local copy of a hub repository that has just been downloaded."""
    config = found.file("config.json")
    assert config is not None
    return Source(found.given, str(config.parent))


def adapter_at(found: Source, option: str) -> AdapterFolder | None:
    """Return the PEFT adapter at a location; None where there is a model.

    Raises:
        ModelNotFoundError: The location cannot be reached.
    """
    try:
        return adapter_folder(found, option)
    except OSError as error:
        if isinstance(error, ModelNotFoundError):
            raise
        raise unreachable(found, option, "model", error) from error


@contextmanager
def _enough_memory(option: str) -> Iterator[None]:
    """Name the option where torch cannot allocate the random weights of a config.

    Raises:
        ModelError: Around torch's RuntimeError.
    """
    try:
        yield
    except RuntimeError as error:
        if "allocate memory" not in str(error):
            raise
        raise ModelError(
            f"{option}: there is no memory for the weights of this config "
            f"({first_line(error)}); give smaller sizes"
        ) from error


def _config_from_mapping(fields: dict[str, Any], option: str, vocab_size: int) -> PretrainedConfig:
    model_type = fields.pop("model_type", None)
    if model_type is None:
        raise ModelError(
            f"{option}: a config for random weights needs model_type (such as llama or gpt2); "
            f"got the fields {sorted(fields)}"
        )
    if model_type not in CONFIG_MAPPING:
        near = difflib.get_close_matches(str(model_type), list(CONFIG_MAPPING.keys()), n=1)
        hint = f"did you mean {near[0]}?" if near else "give one that transformers knows"
        raise ModelError(f"{option}: there is no model_type {model_type!r}; {hint}")
    try:
        return AutoConfig.for_model(model_type, **{"vocab_size": vocab_size, **fields})
    except (ValueError, TypeError, StrictDataclassError) as error:
        reason = str(error.__cause__ or error).strip()
        raise ModelError(f"{option}: {reason.splitlines()[0]}") from error
