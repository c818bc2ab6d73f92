"""Checks that a model has all weights of its files, finite, and trainable if trained.

transformers fills missing weights with random numbers and only logs a table. Here every such case
is an error that names the weights. Owns no loading.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from okd_lightning.errors import ModelError
from okd_lightning.models.weight_files import WeightFiles
from okd_lightning.models.wrapped_names import wrapper_advice

Learns: TypeAlias = Literal["all", "adapter", "nothing"]
"""Trained part of a model: its own weights, an adapter on frozen ones, or nothing."""

_SHOWN = 3
_FLOATS = ("F64", "F32", "F16", "BF16")
_REPORTS = ("LOAD REPORT", "seem corrupted")
_WIDE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@contextmanager
def without_load_report() -> Iterator[None]:
    """Within the context, suppress transformers' table of missing weights; ``check_loaded`` raises.

    A filter and not a log level, so that all other messages are still shown.
    """
    logger = logging.getLogger("transformers.modeling_utils")

    def is_other(record: logging.LogRecord) -> bool:
        return not any(text in record.getMessage() for text in _REPORTS)

    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


def check_loaded(model: PreTrainedModel, info: Mapping[str, Any], where: str) -> None:
    """Refuse a model whose files do not have all its weights.

    Args:
        model: The model that ``from_pretrained`` returned.
        info: Its loading info (``output_loading_info=True``): tied weights and buffers that are
            computed are not among the missing ones.
        where: Option and folder, for messages.

    Raises:
        ModelError: Weights are missing, or have another shape.
    """
    num_weights = len(model.state_dict())
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if missing:
        is_other = unexpected and len(missing) > num_weights // 2
        advice = wrapper_advice(unexpected, _with_bare_names(model, missing)) or (
            f"the files hold other names (such as {unexpected[0]}): config.json is of another "
            "architecture"
            if is_other
            else "they would start from random numbers; copy or download the folder again, or "
            "save the whole model"
        )
        raise ModelError(
            f"{where}: {len(missing)} of {num_weights} weights are missing in the files "
            f"({_some(missing)}); {advice}"
        )
    if info["mismatched_keys"]:
        name, stored, wanted = sorted(info["mismatched_keys"])[0]
        raise ModelError(
            f"{where}: {len(info['mismatched_keys'])} weights are of another shape than "
            f"config.json says, such as {name}: {list(stored)} in the files, {list(wanted)} by the "
            "config; config and weights do not belong together"
        )
    if unexpected:
        warn_unexpected(unexpected, where)


def note_untied(model: PreTrainedModel) -> None:
    """Set ``tie_word_embeddings`` to False if head and embedding of the files are separate.

    transformers keeps such tables separate; a model built from the config again would tie them.
    """
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    first, second = (getattr(table, "weight", None) for table in tables)
    if first is None or second is None or first is second:
        return
    for config in (model.config, model.config.get_text_config()):
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False


def warn_unexpected(names: Collection[str], where: str) -> None:
    """Warn about stored weights that the model does not have."""
    warnings.warn(
        f"{where}: {len(names)} stored weights have no place in this architecture and are not used "
        f"({_some(sorted(names))})",
        stacklevel=2,
    )


def check_stored_formats(
    model: PreTrainedModel,
    files: WeightFiles,
    where: str,
    learns: Learns,
    unexpected: Collection[str] = (),
) -> None:
    """Refuse stored numbers that are not weights, or are too coarse to be trained.

    Integers without a quantization_config lack their scales and give wrong weights. The same holds
    for fp8, except that a frozen model may be stored in fp8 without scales.

    Args:
        model: The loaded model; parameters may be on the meta device.
        files: Its files.
        where: Option and folder, for messages.
        learns: Which part is trained.
        unexpected: Stored names that the model does not have.

    Raises:
        ModelError: There are such weights; the message names them and their number format.
    """
    if is_quantised(model):
        return
    prefix = f"{model.base_model_prefix}."
    own = {name.removeprefix(prefix) for name, _ in model.named_parameters(remove_duplicate=False)}
    found = {
        name: kind
        for name, kind in files.dtypes.items()
        if kind not in _FLOATS
        and name not in unexpected
        and (name.removeprefix(prefix) in own or name.endswith(".weight"))
    }
    coarse = [n for n, kind in found.items() if kind.startswith(("F8", "F4"))]
    if learns == "nothing" and len(coarse) == len(found):
        return
    if found:
        name = min(found)
        raise ModelError(
            f"{where}: {len(found)} weights are stored as integers or in fp8 (such as {name} as "
            f"{found[name]}), and config.json has no quantization_config: expected float32, "
            "float16 or bfloat16; save the model dequantised"
        )


def check_values(model: PreTrainedModel, where: str, learns: Learns) -> None:
    """Refuse weights that are not finite, or that are to be trained and cannot be.

    One pass over all weights. Weights on the meta device are checked when they are loaded.

    Args:
        model: A loaded model; not changed.
        where: Option and folder, for messages.
        learns: Which part is trained.

    Raises:
        ModelError: There are such weights; the message names them.
    """
    parameters = dict(model.named_parameters())
    broken = [name for name, value in parameters.items() if not is_finite(value)]
    if broken:
        raise ModelError(not_finite(broken, where))
    if learns == "all":
        check_trainable(parameters.items(), where)


def not_finite(names: Collection[str], where: str) -> str:
    """Return the message for weights with NaN or infinity."""
    return (
        f"{where}: {len(names)} weights hold NaN or infinity ({_some(sorted(names))}); the model "
        "was broken when it was saved: use an earlier checkpoint of it"
    )


def check_trainable(parameters: Iterable[tuple[str, nn.Parameter]], where: str) -> None:
    """Refuse to train integers or fp8.

    Raises:
        ModelError: There are such weights; the message names them and their number format.
    """
    found = {name: value.dtype for name, value in parameters if value.dtype not in _WIDE}
    if found:
        name = min(found)
        raise ModelError(
            f"{where}: {len(found)} weights are quantised (such as {name}, "
            f"{str(found[name]).removeprefix('torch.')}) and cannot be trained; give "
            "--model.student_adapter LoraConfig, which trains an adapter on them, or a folder that "
            "is not quantised"
        )


def is_finite(value: Tensor) -> bool:
    """Return whether all elements are finite, without a copy of the tensor (fp8 is widened)."""
    if value.is_meta or not value.numel() or not value.dtype.is_floating_point:
        return True
    value = value.detach()
    if value.dtype not in _WIDE:
        value = value.to(torch.bfloat16)
    lowest, highest = torch.aminmax(value)  # both are NaN if any element is
    return bool(lowest.isfinite() & highest.isfinite())


def is_quantised(model: PreTrainedModel) -> bool:
    """Return whether transformers loaded the model as a quantised one, dequantised or not."""
    return (
        getattr(model, "hf_quantizer", None) is not None
        or getattr(model.config, "quantization_config", None) is not None
    )


def is_ignored(name: str, patterns: Iterable[str] | None) -> bool:
    """Return whether one of a model class's ignore patterns matches a name."""
    return any(re.search(pattern, name) for pattern in patterns or ())


def _with_bare_names(model: PreTrainedModel, names: Iterable[str]) -> set[str]:
    """Return names with and without the base model's prefix: files may have either."""
    prefix = f"{model.base_model_prefix}."
    return {form for name in names for form in (name, name.removeprefix(prefix))}


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return f"{shown} and {len(names) - _SHOWN} more" if len(names) > _SHOWN else shown
