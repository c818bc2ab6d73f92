"""Images of rows: references to their files, and the further inputs that a model gets for them.

Rows, examples and checkpoints hold references. The pixels of a batch are made when the batch is
used (``models.processors``). This file decodes no image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MARKER = "<image>"
"""Place of an image in a text or a message, for every model."""


@dataclass(frozen=True)
class ImageRef:
    """One image of a row.

    Attributes:
        name: As the user gave it, for messages and tables.
        path: Path of the file; empty where the row itself holds the bytes.
        data: The encoded file where the row itself holds it; empty otherwise.
        sha256: Hash of the encoded file, in hexadecimal digits.
        width: Pixels.
        height: Pixels.
    """

    name: str
    path: str
    data: bytes
    sha256: str
    width: int
    height: int


def named(text: str, images: Sequence[ImageRef]) -> str:
    """Return a text for display: its last image places are replaced by the images' names."""
    first, *others = text.split(MARKER)
    if not 0 < len(others) <= len(images):
        return text
    names = [image.name for image in images[-len(others) :]]
    return first + "".join(f"[{name}]{o}" for name, o in zip(names, others, strict=True))


@dataclass(frozen=True)
class ImageInputs:
    """Inputs of one model for the images of some rows, such as pixel values and patch grids.

    The first axis of a tensor counts images, crops of images or patches, row by row.

    Attributes:
        tensors: [entries, ...] by the name of the model's argument.
        counts: Entries of each row, by the same names.
        is_nested: Whether the model expects [1, entries, ...].
    """

    tensors: Mapping[str, Tensor]
    counts: Mapping[str, tuple[int, ...]]
    is_nested: bool = False

    def of_rows(self, rows: Sequence[int]) -> ImageInputs:
        """Return the inputs of some rows; the tensors may be empty.

        Args:
            rows: At least one, ascending.
        """
        parts = {name: t.split(list(self.counts[name])) for name, t in self.tensors.items()}
        return ImageInputs(
            {name: torch.cat([part[row] for row in rows]) for name, part in parts.items()},
            {name: tuple(counts[row] for row in rows) for name, counts in self.counts.items()},
            self.is_nested,
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> ImageInputs:
        """Return the inputs on another device."""
        moved = {n: t.to(device, non_blocking=non_blocking) for n, t in self.tensors.items()}
        return ImageInputs(moved, self.counts, self.is_nested)

    @property
    def arguments(self) -> dict[str, Tensor]:
        """Arguments of the model's forward pass; none where no row has an image."""
        given = {name: t for name, t in self.tensors.items() if len(t)}
        return {name: t[None] for name, t in given.items()} if self.is_nested else given


def joined(parts: Sequence[ImageInputs | None]) -> ImageInputs | None:
    """Return the inputs of several rows as one; None where no row has an image.

    Tensors of different sizes are padded with zeros at the end, which a model's own mask of the
    pixels (``pixel_attention_mask``) leaves out.

    Args:
        parts: The inputs of each row; None for a row without images.

    Raises:
        ValueError: Tensors of different sizes, and no mask of the pixels.
    """
    given = [part for part in parts if part is not None]
    if not given:
        return None
    names = list(given[0].tensors)
    tensors = {name: _stacked([part.tensors[name] for part in given], names) for name in names}
    counts = {
        name: tuple(0 if part is None else len(part.tensors[name]) for part in parts)
        for name in names
    }
    return ImageInputs(tensors, counts, given[0].is_nested)


def _stacked(tensors: Sequence[Tensor], names: Sequence[str]) -> Tensor:
    shapes = {tuple(t.shape[1:]) for t in tensors}
    if len(shapes) == 1:
        return torch.cat(list(tensors))
    if "pixel_attention_mask" not in names:
        raise ValueError(f"images of sizes {sorted(shapes)}")
    largest = [max(sizes) for sizes in zip(*shapes, strict=True)]
    total = tensors[0].new_zeros(sum(map(len, tensors)), *largest)
    first = 0
    for tensor in tensors:
        place = (slice(first, first + len(tensor)), *(slice(size) for size in tensor.shape[1:]))
        total[place] = tensor
        first += len(tensor)
    return total
