"""Rows of whole texts (language modelling): every token but the first one carries loss."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from okd_lightning.data.columns import Columns, RawRow, read_response
from okd_lightning.data.tokens import encode_prompts
from okd_lightning.errors import DataError
from okd_lightning.records import Example


def examples_from_whole_texts(
    rows: Sequence[RawRow],
    tokenizer: PreTrainedTokenizerBase,
    *,
    eos_id: int,
    columns: Columns,
    where: str,
) -> list[Example]:
    """One example a row, of any length.

    The prompt is the token that nothing stands before: the bos where the tokenizer adds one, else
    the text's first token. All others are the response, with the eos behind them.

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
    return [
        _example(index, text, ids, eos_id, tokenizer)
        for index, (text, ids) in enumerate(
            zip(texts, encode_prompts(tokenizer, texts), strict=True)
        )
    ]


def _example(
    index: int, text: str, ids: list[int], eos_id: int, tokenizer: PreTrainedTokenizerBase
) -> Example:
    rest = ids[1:]
    is_ended = bool(rest) and rest[-1] == eos_id
    return Example(
        index=index,
        prompt_ids=tuple(ids[:1]),
        prompt_mask=(False,),
        response_ids=tuple(rest) if is_ended else (*rest, eos_id),
        prompt=str(tokenizer.decode(ids[:1])),
        response=text,
    )
