"""Loading: a folder, a hub id or a config becomes a causal LM, or one readable error.

Owns what may be loaded (safetensors only, no remote code) and in which number format. Does not own
devices or sharding: models come back on the CPU, in training mode off, with gradients as loaded.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from peft import AutoPeftModelForCausalLM, PeftConfig
from safetensors import SafetensorError
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from okd_lightning.errors import ConfigError, ModelError, ModelNotFoundError
from okd_lightning.models.deferred import (
    causal_lm_without_weights,
    is_deferred,
    stand_ins,
)

DTypeName: TypeAlias = Literal["float32", "bfloat16", "float16"]

ModelSource: TypeAlias = str | dict[str, Any] | PreTrainedModel
"""A folder or hub id; a config to start from random weights; or a model that is already loaded."""

if TYPE_CHECKING:
    ModelArgument: TypeAlias = ModelSource
else:  # what can be typed: --help would else list every architecture of transformers
    ModelArgument = str | dict[str, Any]


def check_precision(precision: str) -> None:
    """Refuse Lightning's "true" precisions: models are loaded in their own number format.

    Raises:
        ConfigError: Naming what to give instead.
    """
    if precision.endswith("-true") and precision != "32-true":
        raise ConfigError(
            f"trainer.precision {precision} would convert batches and losses as well; give "
            "--trainer.precision bf16-mixed (and --model.teacher_dtype bfloat16), or load the "
            "weights themselves in bfloat16 with --model.dtype bfloat16"
        )


def dtype_of(source: ModelSource | None, asked: DTypeName) -> DTypeName:
    """The number format of a model's weights: a loaded one keeps its own."""
    if not isinstance(source, PreTrainedModel):
        return asked
    return cast(DTypeName, str(source.dtype).removeprefix("torch."))


def load_model_config(source: ModelSource, option: str, vocab_size: int) -> PretrainedConfig:
    """The configuration of a model, without its weights.

    Args:
        source: Folder, hub id, config mapping (``model_type`` and the fields of that
            architecture) or a loaded model.
        option: How the user named it, for messages, such as ``--model.student``.
        vocab_size: Used by a config mapping that does not give its own.

    Raises:
        ModelNotFoundError: No such folder or hub id.
        ModelError: A config mapping without a known ``model_type``.
    """
    if isinstance(source, PreTrainedModel):
        return source.config
    if isinstance(source, Mapping):
        return _config_from_mapping(dict(source), option, vocab_size)
    _require_folder_if_path(source, option)
    try:
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ModelNotFoundError(_not_found(source, option, "model", error)) from error


def load_tokenizer(source: str, option: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub id.

    Raises:
        ModelNotFoundError: No such folder or hub id, or no tokenizer in it.
    """
    _require_folder_if_path(source, option)
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ModelNotFoundError(_not_found(source, option, "tokenizer", error)) from error


def load_causal_lm(
    source: ModelSource,
    config: PretrainedConfig,
    option: str,
    *,
    dtype: DTypeName = "float32",
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """A causal LM: loaded weights, or random ones where ``source`` is a config mapping.

    Args:
        source: What ``config`` was loaded from.
        config: From ``load_model_config``.
        option: How the user named it, for messages.
        dtype: Number format of the weights.
        attn_implementation: Such as "sdpa" or "flash_attention_2"; None lets transformers choose.

    Raises:
        ModelError: Weights that are not safetensors, or that do not fit the architecture.
    """
    if isinstance(source, PreTrainedModel):  # in the number format and with the kernel that it has
        return source
    number_format = getattr(torch, dtype)
    if isinstance(source, Mapping):
        return AutoModelForCausalLM.from_config(
            config, dtype=number_format, attn_implementation=attn_implementation
        )
    if (Path(source) / "adapter_config.json").is_file():
        return _load_adapted(source, option, number_format, attn_implementation)
    if is_deferred():
        return causal_lm_without_weights(source, config, number_format, attn_implementation)
    try:
        return AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            dtype=number_format,
            attn_implementation=attn_implementation,
            use_safetensors=True,
        )
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise ModelError(
            f"{option} {source!r}: the weights could not be loaded as a causal language model "
            f"(safetensors are needed): {_first_line(error)}"
        ) from error


def _load_adapted(
    folder: str, option: str, number_format: torch.dtype, attn_implementation: str | None
) -> PreTrainedModel:
    """A PEFT folder's base with the adapter merged into its weights."""
    try:
        adapted = AutoPeftModelForCausalLM.from_pretrained(
            folder,
            dtype=number_format,
            attn_implementation=attn_implementation,
            use_safetensors=True,
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise ModelError(f"{option} {folder!r}: {_first_line(error)}") from error
    if adapted.active_peft_config.is_prompt_learning:
        raise ModelError(
            f"{option} {folder!r} is a prompt-learning adapter, which cannot be merged into its "
            "base; use a LoRA module, or the base itself"
        )
    return adapted.merge_and_unload()


def add_adapter(model: PreTrainedModel, adapter: PeftConfig, option: str) -> None:
    """Put a trainable PEFT adapter on ``model`` in place and freeze everything else.

    A missing ``task_type`` is filled in. Prompt-learning configs are refused: they need a wrapper
    around the model that a student cannot be exported from.

    Raises:
        ConfigError: A prompt-learning config, or target modules that the model does not have.
    """
    if adapter.is_prompt_learning:
        raise ConfigError(
            f"{option}: {type(adapter).__name__} is a prompt-learning adapter; a student takes "
            "adapters that change its layers, such as LoraConfig"
        )
    adapter.task_type = adapter.task_type or "CAUSAL_LM"
    try:
        with stand_ins(model, option), warnings.catch_warnings():
            # PEFT sets it to what the layer is (GPT-2's are transposed) and says so
            warnings.filterwarnings("ignore", "fan_in_fan_out is set to")
            model.add_adapter(adapter)
        for parameter in model.parameters():
            if parameter.requires_grad:  # the base may be bfloat16; what is trained is not
                parameter.data = parameter.data.float()
    except ConfigError:
        raise
    except ValueError as error:
        layers = sorted(
            {
                name.rsplit(".", 1)[-1]
                for name, module in model.named_modules()
                if isinstance(module, torch.nn.Linear)
            }
        )
        raise ConfigError(
            f"{option}: {_first_line(error)} Linear layers of this model: {', '.join(layers)}"
        ) from error


def eos_token_ids(source: ModelSource, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """All ids that end a response; the first is the one that training data gets.

    Taken from the student's generation config, else from the one beside the tokenizer, else from
    the tokenizer.

    Args:
        source: The student.
        tokenizer: Its tokenizer.

    Raises:
        ModelError: None of them names an end-of-sequence id, or it is no id of the tokenizer.
    """
    ids = _generation_eos(source)
    if ids is None and Path(tokenizer.name_or_path or "").is_dir():
        ids = _generation_eos(tokenizer.name_or_path)
    if ids is None:
        ids = tokenizer.eos_token_id
    if ids is None:
        raise ModelError(
            "neither the student's generation config nor its tokenizer names an end-of-sequence "
            "token; set eos_token_id in generation_config.json"
        )
    found = (ids,) if isinstance(ids, int) else tuple(ids)
    foreign = [i for i in found if i not in tokenizer.get_vocab().values()]
    if foreign:
        raise ModelError(
            f"the student's end-of-sequence ids {list(found)} hold {foreign[0]}, which is no token "
            "of the tokenizer; set eos_token_id in the student's generation config"
        )
    return found


def _generation_eos(source: ModelSource) -> int | list[int] | None:
    if isinstance(source, PreTrainedModel):
        return source.generation_config.eos_token_id if source.generation_config else None
    if isinstance(source, Mapping):
        return source.get("eos_token_id")
    try:
        return GenerationConfig.from_pretrained(source).eos_token_id
    except OSError:  # a folder without generation_config.json
        return None


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


def _require_folder_if_path(source: str, option: str) -> None:
    path = Path(source)
    looks_local = source.startswith((".", "/", "~")) or source.count("/") > 1
    if path.exists() or not looks_local:
        return
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, siblings, n=1)
    hint = f"; did you mean {path.parent / near[0]}?" if near else ""
    raise ModelNotFoundError(f"{option} {source!r}: there is no such folder{hint}")


def _not_found(source: str, option: str, what: str, error: Exception) -> str:
    if Path(source).is_dir():
        return f"{option} {source!r}: the folder holds no {what} that loads: {_first_line(error)}"
    return (
        f"{option} {source!r}: neither a folder nor a hub id that can be reached "
        f"({_first_line(error)}); give the path of a folder with config.json and safetensors"
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
