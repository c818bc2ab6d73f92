"""Rollouts and advantages as flat tensors, which ``weights_only`` loading accepts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from okd_lightning.records.requests import STOP_REASONS, Response, Rollout


def pack_rollout(rollout: Sequence[Response]) -> dict[str, Tensor]:
    """Pack a rollout for ``unpack_rollout``; tool use is not kept."""
    return {
        "lengths": torch.tensor([len(row.ids) for row in rollout]),
        "ids": torch.tensor([i for row in rollout for i in row.ids], dtype=torch.int64),
        "logprobs": torch.tensor([p for row in rollout for p in row.logprobs], dtype=torch.float64),
        "own": torch.tensor([own for row in rollout for own in row.mask], dtype=torch.bool),
        "reasons": torch.tensor([STOP_REASONS.index(row.stop_reason) for row in rollout]),
        "merges_ends": torch.tensor([row.merges_ends for row in rollout], dtype=torch.bool),
    }


def unpack_rollout(packed: dict[str, Tensor]) -> Rollout:
    """Return the rollout of ``pack_rollout``."""
    lengths = packed["lengths"].tolist()
    parts = [packed[name].split(lengths) for name in ("ids", "logprobs", "own")]
    columns = [[tuple(part.tolist()) for part in column] for column in parts]
    reasons = [STOP_REASONS[code] for code in packed["reasons"].tolist()]
    # not in checkpoints that were written before end ids were one outcome
    merges_ends = (
        packed["merges_ends"].tolist() if "merges_ends" in packed else [False] * len(lengths)
    )
    rows = zip(*columns, reasons, merges_ends, strict=True)
    return Rollout(
        tuple(
            Response(ids, logprobs, why, own, merges_ends=merges)
            for ids, logprobs, own, why, merges in rows
        )
    )


def pack_credits(credits: dict[str, list[float]] | None) -> dict[str, Tensor] | None:
    """Pack advantages by the term's name; None stays None."""
    if credits is None:
        return None
    return {name: torch.tensor(row, dtype=torch.float64) for name, row in credits.items()}


def unpack_credits(packed: dict[str, Tensor] | None) -> dict[str, list[float]] | None:
    """Return the advantages of ``pack_credits``."""
    return None if packed is None else {name: row.tolist() for name, row in packed.items()}
