"""Rows of prompt and response to examples: prompt + response + eos."""

from __future__ import annotations

from collections.abc import Sequence

from okd_lightning.data.columns import Columns, RawRow, read_prompt, read_response
from okd_lightning.data.images import RowImages
from okd_lightning.errors import DataError
from okd_lightning.models.text_ids import TextEncoder
from okd_lightning.records.batches import Example
from okd_lightning.records.images import ImageRef


def _with_images(
    prompts: Sequence[str],
    rows: Sequence[RawRow],
    places: Sequence[str],
    columns: Columns,
    images: RowImages,
) -> tuple[list[str], list[tuple[ImageRef, ...]]]:
    """Return the prompts with the tokens of their images, and each row's images."""
    refs = [
        images.of_row(row, columns, at, prompt)
        for row, at, prompt in zip(rows, places, prompts, strict=True)
    ]
    texts = [
        images.prompt(prompt, own, at, is_rendered=False)
        for prompt, own, at in zip(prompts, refs, places, strict=True)
    ]
    return texts, refs


def examples_from_texts(
    rows: Sequence[RawRow],
    encoder: TextEncoder,
    *,
    eos_ids: Sequence[int],
    columns: Columns,
    max_prompt_length: int,
    max_response_length: int,
    needs_response: bool,
    where: str,
    images: RowImages | None = None,
) -> list[Example]:
    """Return one example per row; a blank response becomes no response.

    A response ends with the eos in its text, else with the first of ``eos_ids``. Prompts and
    responses above their limits keep some tokens beyond them.

    ``eos_ids`` are the ids that end a response; the other arguments are those of
    ``examples.build_examples``.

    Raises:
        DataError: A cell is missing or not text, or a prompt is empty.
    """
    places = [f"{where}, row {number}" for number in range(1, len(rows) + 1)]
    prompts = [read_prompt(row, columns, at) for row, at in zip(rows, places, strict=True)]
    responses = [
        read_response(row, columns, at, needs_response=needs_response)
        for row, at in zip(rows, places, strict=True)
    ]
    texts = prompts
    refs: list[tuple[ImageRef, ...]] = [()] * len(rows)
    if images is not None:
        texts, refs = _with_images(prompts, rows, places, columns, images)
    prompt_ids = encoder.prompts(texts, limit=max_prompt_length)
    for ids, prompt, at in zip(prompt_ids, prompts, places, strict=True):
        if not ids:
            raise DataError(f"{at}: the prompt {prompt!r} has no tokens; fill or delete the row")
    answered = [
        row
        for row, ids in enumerate(prompt_ids)
        if responses[row].strip() and len(ids) <= max_prompt_length  # others are skipped later
    ]
    found = encoder.continuations(
        [texts[row] for row in answered],
        [responses[row] for row in answered],
        limit=max_response_length,
    )
    response_ids = dict(zip(answered, found, strict=True))
    return [
        Example(
            index=row,
            prompt_ids=tuple(ids),
            prompt_mask=(False,) * len(ids),
            response_ids=tuple(ended(response_ids.get(row, []), encoder, eos_ids)),
            prompt=prompts[row],
            response=responses[row] if response_ids.get(row) else "",
            images=refs[row],
        )
        for row, ids in enumerate(prompt_ids)
    ]


def ended(ids: list[int], encoder: TextEncoder, eos_ids: Sequence[int]) -> list[int]:
    """Return a response's ids with one end id; empty ids stay empty."""
    end = encoder.end_of(ids, eos_ids)
    if end is not None:
        return ids[:end]
    return [*ids, eos_ids[0]] if ids else []
