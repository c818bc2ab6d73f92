"""Rollouts and advantages as flat tensors, which ``weights_only`` loading accepts."""

from __future__ import annotations

import torch
from torch import Tensor

from okd_lightning.records.batches import STOP_REASONS, Rollout


def pack_rollout(rollout: Rollout) -> dict[str, Tensor]:
    """Pack a rollout for ``unpack_rollout``; tool use is not kept."""
    return {
        "lengths": torch.tensor([len(ids) for ids in rollout.response_ids]),
        "ids": torch.tensor([i for ids in rollout.response_ids for i in ids], dtype=torch.int64),
        "logprobs": torch.tensor([p for row in rollout.logprobs for p in row], dtype=torch.float64),
        "own": torch.tensor([own for mask in rollout.own_masks for own in mask], dtype=torch.bool),
        "reasons": torch.tensor([STOP_REASONS.index(reason) for reason in rollout.stop_reasons]),
        **({"merges_ends": torch.tensor(rollout.merges_ends)} if rollout.merges_ends else {}),
    }


def unpack_rollout(packed: dict[str, Tensor]) -> Rollout:
    """Return the rollout of ``pack_rollout``."""
    lengths = packed["lengths"].tolist()
    return Rollout(
        response_ids=tuple(tuple(part.tolist()) for part in packed["ids"].split(lengths)),
        logprobs=tuple(tuple(part.tolist()) for part in packed["logprobs"].split(lengths)),
        stop_reasons=tuple(STOP_REASONS[code] for code in packed["reasons"].tolist()),
        masks=tuple(tuple(part.tolist()) for part in packed["own"].split(lengths)),
        merges_ends=tuple(packed["merges_ends"].tolist()) if "merges_ends" in packed else (),
    )


def pack_credits(credits: dict[str, list[float]] | None) -> dict[str, Tensor] | None:
    """Pack advantages by the term's name; None stays None."""
    if credits is None:
        return None
    return {name: torch.tensor(row, dtype=torch.float64) for name, row in credits.items()}


def unpack_credits(packed: dict[str, Tensor] | None) -> dict[str, list[float]] | None:
    """Return the advantages of ``pack_credits``."""
    return None if packed is None else {name: row.tolist() for name, row in packed.items()}
