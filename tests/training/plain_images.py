"""The slow reference of runs with images: one recorded row at a time, by plain transformers calls.

Pixels and grids are those that the model's own processor makes of the opened files; nothing of ours
but the recorded batches is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import vision
from PIL import Image
from torch import Tensor


@dataclass(frozen=True)
class PlainRow:
    """One row of a recorded batch, without padding, as one model reads it."""

    ids: Tensor
    mask: Tensor
    images: tuple
    source: int
    index: int
    sampler: Tensor

    @property
    def drawn(self) -> Tensor:
        """Ids of the loss tokens."""
        return self.ids[self.mask]


def rows_of(batches, side: str = "student") -> Iterator[PlainRow]:
    """Yield the rows of an optimizer step as a side reads them."""
    for batch in batches:
        for i in range(len(batch)):
            own = batch.input_ids, batch.lengths, batch.mask, batch.images
            if side == "teacher" and batch.teacher_input_ids is not None:
                own = batch.teacher_input_ids, batch.teacher_lengths, batch.teacher_mask, ()
            ids, lengths, mask, images = own
            images = batch.teacher_images if side == "teacher" else images
            length = int(lengths[i])
            sampler = batch.sampler_logprobs[i][batch.mask[i]].double()
            yield PlainRow(
                ids[i, :length],
                mask[i, :length],
                images[i] if images else (),
                int(batch.source[i]),
                int(batch.index[i]),
                sampler,
            )


def pixels(processor, images) -> dict[str, Tensor]:
    """Inputs of a model for images, by its processor; none without images."""
    if not images:
        return {}
    text = processor.image_token * len(images)
    pictures = [Image.open(image.path).convert("RGB") for image in images]
    found = dict(processor(text=[text], images=[pictures], return_tensors="pt"))
    for name in ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"):
        found.pop(name, None)
    return found


def logprobs(model, reader, row: PlainRow, num_ids: int) -> Tensor:
    """[loss tokens, ids] of a row; ids of images are masked, ids beyond the tokenizer cut."""
    ids = row.ids[None]
    given = pixels(reader.processor, row.images)
    given = {n: v.to(model.dtype) if v.is_floating_point() else v for n, v in given.items()}
    if "image_grid_thw" in given:
        given["mm_token_type_ids"] = (ids == vision.IMAGE_ID).long()
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **given).logits
    before = logits[0, :-1, :num_ids][row.mask[1:]]
    masked = torch.zeros(num_ids, dtype=torch.bool)
    masked[sorted(reader.mask_ids)] = True
    return before.double().masked_fill(masked, -torch.inf).log_softmax(-1)


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a‖b) a position; ids of probability 0 on both sides add nothing."""
    return torch.where(log_a > -torch.inf, log_a.exp() * (log_a - log_b), 0.0).sum(-1)


def gradients(models, loss: Tensor) -> dict[str, Tensor]:
    """Gradients by name, of parameters that a run trains."""
    found = {}
    for model in models:
        model.zero_grad()
    loss.backward()
    for model in models:
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        found |= {n: p.grad.clone() for n, p in trained.items() if p.grad is not None}
    return found
