"""Images of prompts: model inputs at the prefill, and positions of the tokens after them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from okd_lightning.errors import ConfigError
from okd_lightning.models.multimodal import positions_of
from okd_lightning.models.processors import ImageReader
from okd_lightning.records.images import ImageInputs, ImageRef
from okd_lightning.records.requests import Prompt


@dataclass(frozen=True)
class PromptImages:
    """The images of some rows of a call.

    Attributes:
        reader: The processor of the models that read them.
        refs: Each row's images, by its number in the call.
    """

    reader: ImageReader
    refs: Mapping[int, tuple[ImageRef, ...]]

    @classmethod
    def of(cls, reader: ImageReader | None, prompts: Sequence[Prompt]) -> PromptImages:
        """Return the images of prompts, of which at least one has one.

        Raises:
            ConfigError: There is no processor.
        """
        if reader is None:
            raise ConfigError(
                "prompts have images, and this engine has no processor: give TransformersEngine "
                "images=, or leave build_engine to the module"
            )
        return cls(reader, {row: prompt.images for row, prompt in enumerate(prompts)})

    def inputs(self, rows: Sequence[int], device: torch.device) -> ImageInputs | None:
        """Return the inputs of some rows; None where none of them has an image."""
        found = self.reader.inputs([self.refs[row] for row in rows])
        return None if found is None else found.to(device)


def placed(
    models: Sequence[PreTrainedModel],
    ids: Tensor,
    starts: Tensor,
    images: ImageInputs | None,
    positions: Sequence[Tensor],
    deltas: Tensor,
) -> tuple[list[Tensor], Tensor]:
    """Return the positions of prompts for each model, where images have several axes.

    Args:
        models: The models.
        ids: [rows, seq], padded on the left.
        starts: [rows] first column of each row.
        images: The inputs of their images.
        positions: Each model's [rows, seq] positions on one axis.
        deltas: [models, rows] zeros.

    Returns:
        Each model's [rows, seq] or [3, rows, seq] positions; and [models, rows] the difference of a
        later token's position and its number in its row.
    """
    columns = torch.arange(ids.shape[1], device=ids.device)
    found, deltas = list(positions), deltas.clone()
    for number, model in enumerate(models):
        axes, more = positions_of(model, ids, images, columns >= starts[:, None])
        if axes is not None and more is not None:
            found[number], deltas[number] = axes, more
    return found, deltas
