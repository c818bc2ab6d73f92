"""Responses of a batch as text, for tables and files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from okd_lightning.records.batches import DistillBatch
from okd_lightning.records.requests import stretches


class Decode(Protocol):
    """Ids to text, with or without special tokens."""

    def __call__(self, ids: Sequence[int], special_tokens: bool = False) -> str:
        """Return the text of ``ids``."""


def response_record(batch: DistillBatch, row: int, decode: Decode) -> dict[str, Any]:
    """Return a row for the generations on disk: prompt and response as text.

    ``text`` is both of them with all special tokens. The response is the whole conversation after
    the prompt. ``num_tokens`` counts sampled tokens. With tool results, ``turns`` lists the parts
    of model and tools.
    """
    start, end = int(batch.prompt_lengths[row]), int(batch.lengths[row])
    ids, own = batch.input_ids[row, :end].tolist(), batch.mask[row, :end].tolist()
    parts = stretches(ids[start:], own[start:])
    record = {
        "index": int(batch.index[row]),
        "prompt": decode(ids[:start]),
        "response": decode(ids[start:]),
        "text": decode(ids, special_tokens=True),
        "num_tokens": sum(own[start:]),
    }
    if len(parts) > 1:
        record["turns"] = [
            {"by": "model" if is_own else "tools", "text": decode(part)} for part, is_own in parts
        ]
    return record


def generation_records(batch: DistillBatch, decode: Decode) -> list[dict[str, Any]]:
    """Return a record of every sampled response of a batch; rows without one are left out.

    Args:
        batch: Rows with sampled responses.
        decode: See ``Decode``.
    """
    return [
        response_record(batch, row, decode) | {"stop_reason": reason}
        for row, reason in enumerate(batch.stop_reasons)
        if reason and batch.prompt_lengths[row] < batch.lengths[row]
    ]
