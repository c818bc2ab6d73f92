"""Rows of prompt and response to examples: prompt + response + eos, tokenized apart."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from okd_lightning.data.columns import Columns, RawRow, read_prompt, read_response
from okd_lightning.data.tokens import encode_prompts, encode_texts
from okd_lightning.errors import DataError
from okd_lightning.records import Example


def _example(
    index: int, prompt: str, prompt_ids: list[int], response: str, response_ids: list[int], eos: int
) -> Example:
    has_response = bool(response_ids) and bool(response.strip())
    return Example(
        index=index,
        prompt_ids=tuple(prompt_ids),
        prompt_mask=(False,) * len(prompt_ids),
        response_ids=(*response_ids, eos) if has_response else (),
        prompt=prompt,
        response=response if has_response else "",
    )


def examples_from_texts(
    rows: Sequence[RawRow],
    tokenizer: PreTrainedTokenizerBase,
    *,
    eos_id: int,
    columns: Columns,
    needs_response: bool,
    where: str,
) -> list[Example]:
    """One example a row, of any length; a blank response becomes no response.

    The prompt gets the special tokens that the tokenizer opens a text with (bos), the response none
    but the eos behind it.

    Raises:
        DataError: A cell is missing or not text, or a prompt is empty.
    """
    places = [f"{where}, row {number}" for number in range(1, len(rows) + 1)]
    prompts = [read_prompt(row, columns, at) for row, at in zip(rows, places, strict=True)]
    responses = [
        read_response(row, columns, at, needs_response=needs_response)
        for row, at in zip(rows, places, strict=True)
    ]
    prompt_ids = encode_prompts(tokenizer, prompts)
    response_ids = encode_texts(tokenizer, responses)
    for ids, prompt, at in zip(prompt_ids, prompts, places, strict=True):
        if not ids:
            raise DataError(f"{at}: the prompt {prompt!r} has no tokens; fill or delete the row")
    columns_of_text = zip(prompts, prompt_ids, responses, response_ids, strict=True)
    return [_example(index, *cells, eos_id) for index, cells in enumerate(columns_of_text)]
