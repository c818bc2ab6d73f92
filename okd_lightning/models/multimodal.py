"""Vision-language models: supported configs, frozen parts, and arguments for images.

Owns the differences from a text model in a forward pass: further arguments for the images of the
rows, types of tokens, and positions of several axes (M-RoPE).
"""

from __future__ import annotations

import re
from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)

from okd_lightning.errors import ConfigError
from okd_lightning.models.causal_lm import named_arguments
from okd_lightning.records.images import ImageInputs

FAMILIES = ("gemma3", "idefics3", "llava", "qwen2_5_vl", "qwen2_vl", "smolvlm")
"""Values of ``model_type`` whose images are supported."""

_TOWERS = ("vision_tower", "vision_model", "visual")
_MERGER = "merger"  # the projector within the tower of the Qwen family

_PLACEHOLDERS = (
    "image_token_id",
    "image_token_index",
    "video_token_id",
    "vision_start_token_id",
    "vision_end_token_id",
    "boi_token_index",
    "eoi_token_index",
)


def reads_images(config: PretrainedConfig) -> bool:
    """Return whether a config is one of a vision-language model that is supported."""
    return config.model_type in FAMILIES


def auto_class(config: PretrainedConfig) -> Any:
    """Return the class of transformers that builds the model of a config."""
    return AutoModelForImageTextToText if reads_images(config) else AutoModelForCausalLM


def image_token_id(config: PretrainedConfig) -> int:
    """Return the id in whose places a model puts the features of images."""
    found = getattr(config, "image_token_id", None)
    return int(config.image_token_index if found is None else found)


def placeholder_ids(config: PretrainedConfig) -> frozenset[int]:
    """Return the ids that a config names as places of images and videos."""
    found = (getattr(config, name, None) for name in _PLACEHOLDERS)
    return frozenset(int(i) for i in found if i is not None)


def image_arguments(
    model: PreTrainedModel, input_ids: Tensor, images: ImageInputs | None
) -> dict[str, Tensor]:
    """Return the arguments of a forward pass for the images of its rows; none without images.

    Args:
        model: The model, wrapped or not.
        input_ids: [batch, seq].
        images: The inputs of these rows' images.

    Raises:
        ConfigError: There are images, and the model is a text model.
    """
    given = {} if images is None else images.arguments
    if not given:
        return {}
    if not reads_images(model.config):
        raise ConfigError(
            f"the rows have images, and {type(model).__name__} reads text alone; give a "
            "vision-language model in its place"
        )
    is_image = (input_ids == image_token_id(model.config)).long()
    names = named_arguments(model)
    types = ("token_type_ids", "mm_token_type_ids")
    return {**given, **{name: is_image for name in types if name in names}}


def positions_of(
    model: PreTrainedModel, input_ids: Tensor, images: ImageInputs | None, mask: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Return the positions of rows with images on several axes (M-RoPE), for generation.

    Args:
        model: A vision-language model.
        input_ids: [rows, seq] prompts, padded on any side.
        images: The inputs of their images.
        mask: [rows, seq] True on real tokens.

    Returns:
        [3, rows, seq] positions, and [rows] the difference of a later token's position and its
        number in the row. None for a model with positions on one axis, and for rows without images.
    """
    indexed = getattr(getattr(model, "model", None), "get_rope_index", None)
    arguments = image_arguments(model, input_ids, images)
    if indexed is None or not arguments:
        return None, None
    positions, deltas = indexed(
        input_ids,
        mm_token_type_ids=arguments["mm_token_type_ids"],
        image_grid_thw=arguments["image_grid_thw"],
        attention_mask=mask,
    )
    return positions, deltas.flatten()


def vision_parts(model: PreTrainedModel) -> list[nn.Module]:
    """Return the vision towers of a model; none of a text model."""
    return [part for name, part in model.named_modules() if name.rpartition(".")[2] in _TOWERS]


def freeze_vision(model: PreTrainedModel) -> None:
    """Freeze the vision tower of a model; its projector into the language model stays trained."""
    for tower in vision_parts(model):
        for name, parameter in tower.named_parameters():
            if not name.startswith(f"{_MERGER}."):
                parameter.requires_grad_(False)


def language_model(model: PreTrainedModel) -> nn.Module:
    """Return the decoder of a vision-language model; a text model itself."""
    decoder: nn.Module = model.get_decoder() if reads_images(model.config) else model
    return decoder


def unused_without_images(model: PreTrainedModel) -> list[nn.Parameter]:
    """Return the parameters of a vision-language model that rows without images leave out."""
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    inner = (language_model(plain), plain.get_output_embeddings())
    used = {id(parameter) for part in inner for parameter in part.parameters()}
    return [parameter for parameter in model.parameters() if id(parameter) not in used]


def modules_outside_language(model: PreTrainedModel) -> str | None:
    """Return a regular expression for the names of all modules but the language model and the head.

    None for a text model.
    """
    if not reads_images(model.config):
        return None
    inner = (language_model(model), model.get_output_embeddings())
    names = [name for name, module in model.named_modules() if any(module is own for own in inner)]
    return rf"(?!({'|'.join(map(re.escape, names))})(\.|$)).*"
