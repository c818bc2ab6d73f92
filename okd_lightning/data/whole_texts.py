"""Rows of whole texts (language modelling): every token but the first one carries loss."""

from __future__ import annotations

from collections.abc import Sequence

from okd_lightning.data.columns import Columns, RawRow, read_response
from okd_lightning.data.text_rows import ended
from okd_lightning.errors import DataError
from okd_lightning.models.text_ids import TextEncoder
from okd_lightning.records.batches import Example


def examples_from_whole_texts(
    rows: Sequence[RawRow],
    encoder: TextEncoder,
    *,
    eos_ids: Sequence[int],
    columns: Columns,
    max_prompt_length: int,
    max_response_length: int,
    where: str,
) -> list[Example]:
    """Return one example per row; texts above both limits keep some tokens beyond them.

    The prompt is the first token: the bos if the tokenizer adds one, else the text's first token.
    All others are the response, with one eos at the end.

    ``eos_ids`` are the ids that end a response; the other arguments are those of
    ``examples.build_examples``.

    Raises:
        DataError: A cell is missing, not text, or blank.
    """
    places = [f"{where}, row {number}" for number in range(1, len(rows) + 1)]
    texts = [
        read_response(row, columns, at, needs_response=True)
        for row, at in zip(rows, places, strict=True)
    ]
    for text, at in zip(texts, places, strict=True):
        if not text.strip():
            raise DataError(f"{at}: the text ({columns.response!r}) is empty; delete the row")
    found = encoder.prompts(texts, limit=max_prompt_length + max_response_length)
    for text, ids, at in zip(texts, found, places, strict=True):
        if not ids:
            raise DataError(f"{at}: the text {text!r} has no tokens; delete the row")
    return [
        Example(
            index=index,
            prompt_ids=tuple(ids[:1]),
            prompt_mask=(False,),
            response_ids=tuple(ended(ids[1:], encoder, eos_ids) or eos_ids[:1]),
            prompt=encoder.text_of(ids[0]),
            response=text,
        )
        for index, (text, ids) in enumerate(zip(texts, found, strict=True))
    ]
