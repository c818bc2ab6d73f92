"""Loading of a sequence classifier with one output: a reward model, from a folder or a hub id.

Owns the accepted sources, as ``loading`` does for causal LMs. The model is returned on the CPU,
frozen and in eval mode.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from okd_lightning.errors import ModelError
from okd_lightning.models.deferred import deferred_weights
from okd_lightning.models.loading import (
    DTypeName,
    adapter_at,
    load_model_config,
    weights_from_files,
)
from okd_lightning.models.sources import locate

if TYPE_CHECKING:
    from transformers import PretrainedConfig

StoredFormat: TypeAlias = DTypeName | Literal["auto"]
"""A number format, or that of the files."""


def classifier_config(source: str, option: str) -> PretrainedConfig:
    """Return the config of a sequence classifier with one output.

    Args:
        source: Folder or hub id; see ``locate``.
        option: How the user named it, for messages.

    Raises:
        ModelNotFoundError: No such folder or hub id.
        ModelError: A GGUF file, an adapter, or a model with another number of outputs.
    """
    found = locate(source, option)
    where = f"{option} {source!r}"
    if found.gguf_file is not None:
        raise ModelError(
            f"{where} is a GGUF file, which has no output for rewards; give a folder or hub id of "
            "a sequence classifier with one output"
        )
    if adapter_at(found, option) is not None:
        raise ModelError(
            f"{where} is a PEFT adapter, whose base has no output for rewards; merge it "
            "(merge_and_unload of peft) and give the folder of the whole model"
        )
    config = load_model_config(source, option, 0)
    if config.num_labels != 1:
        kinds = ", ".join(config.architectures or ()) or config.model_type
        raise ModelError(
            f"{where}: config.json ({kinds}) has {config.num_labels} outputs; a reward model has "
            "one: a sequence classifier that was trained and saved with num_labels=1"
        )
    return config


def load_classifier(
    source: str, config: PretrainedConfig, option: str, dtype: StoredFormat = "auto"
) -> PreTrainedModel:
    """Load a sequence classifier, frozen, with exactly the weights of its files.

    Args:
        source: Source of ``config``.
        config: From ``classifier_config``.
        option: How the user named it, for messages.
        dtype: Number format of the weights.

    Raises:
        ModelError: Weights that are missing (those of the output, in a language model), broken, not
            finite or not safetensors.
    """
    with deferred_weights(False):
        model = weights_from_files(
            locate(source, option),
            config,
            option,
            "auto" if dtype == "auto" else getattr(torch, dtype),
            attn_implementation=None,
            learns="nothing",
            kind=AutoModelForSequenceClassification,
            named="sequence classifier",
        )
    return model.requires_grad_(False).eval()


def outputs_of(model: PreTrainedModel, rows: list[list[int]]) -> list[float]:
    """Return the output of each row, as the model gives it for that row alone.

    Rows are padded on the right. Models that read the last token search it as the last one that is
    not ``pad_token_id``; where the config names none, an id is set that no row ends with.

    Args:
        model: From ``load_classifier``.
        rows: Token ids, at least one per row.
    """
    config = model.config.get_text_config()
    own = config.pad_token_id
    pad = own
    if pad is None or pad < 0:
        last = {row[-1] for row in rows}
        pad = next(i for i in range(len(last) + 1) if i not in last)
    width = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=model.device)
    lengths = torch.tensor([len(row) for row in rows], device=model.device)
    mask = torch.arange(width, device=model.device) < lengths[:, None]
    config.pad_token_id = pad
    try:
        with torch.no_grad():
            outputs = model(input_ids=ids, attention_mask=mask).logits
    finally:
        config.pad_token_id = own
    found: list[float] = outputs.reshape(len(rows)).double().tolist()
    return found
