"""Check for ids without an embedding, which a tokenizer with more ids than the models can make."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from okd_lightning.errors import DataError
from okd_lightning.models import Vocabulary
from okd_lightning.records.batches import Example


def check_table_ids(
    examples: Sequence[Example],
    vocabulary: Vocabulary,
    tokenizer: PreTrainedTokenizerBase,
    where: str,
) -> None:
    """Refuse a row with an id that is beyond the models' embedding tables.

    Skipped if the tables have a row for every id of the tokenizer, which is nearly always so.

    Args:
        examples: Tokenized rows.
        vocabulary: The ids that both tables have.
        tokenizer: Tokenizer of the rows.
        where: The dataset's name for messages.

    Raises:
        DataError: There is such a row; the message names the row and the token.
    """
    if Vocabulary.of(tokenizer).size <= vocabulary.size:
        return
    for example in examples:
        for ids in (example.prompt_ids, example.response_ids, example.teacher_prompt_ids):
            beyond = next((i for i in ids if i >= vocabulary.size), None)
            if beyond is not None:
                token = tokenizer.convert_ids_to_tokens(beyond)
                raise DataError(
                    f"{where}, row {example.index + 1}: the token {token!r} has id {beyond}, and "
                    f"the models' embedding tables have rows up to {vocabulary.size - 1}; take it "
                    "out of the row, or use the tokenizer that belongs to these models"
                )
