"""Redistribution of stored rollouts to another number of ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

from okd_lightning.engines.engine import Author
from okd_lightning.records.batches import Rollout

RowKey: TypeAlias = tuple[int, int]
"""An optimizer step of the rollout batch, and the row's place in it over all ranks."""

Credits: TypeAlias = dict[str, list[float]] | None


def reshared(
    stored: Sequence[Mapping[Author, Rollout]],
    owners: Sequence[Mapping[Author, Sequence[RowKey]]],
    own: Mapping[Author, Sequence[RowKey]],
) -> dict[Author, Rollout]:
    """Return this rank's part of all ranks' responses of a rollout batch.

    Args:
        stored: Responses of each saving rank.
        owners: Their rows, in the same order.
        own: The rows of this rank.
    """
    found: dict[Author, Rollout] = {}
    for author, keys in own.items():
        rows = {}
        for part, part_keys in zip(stored, owners, strict=True):
            rollout = part.get(author, Rollout((), (), ()))
            columns = (rollout.response_ids, rollout.logprobs, rollout.stop_reasons)
            flags = (rollout.own_masks, rollout.row_merges_ends)
            named = zip(part_keys[author], *columns, *flags, strict=True)
            rows.update({key: row for key, *row in named})
        if keys:
            taken = zip(*(rows[key] for key in keys), strict=True)
            ids, logprobs, reasons, masks, merges_ends = taken
            merges_ends = merges_ends if any(merges_ends) else ()
            found[author] = Rollout(ids, logprobs, reasons, masks, merges_ends=merges_ends)
    return found


def reshared_credits(
    stored: Sequence[Credits], owners: Sequence[Sequence[RowKey]], own: Sequence[RowKey]
) -> Credits:
    """Redistribute the advantages of the student's rows likewise; None if there are none."""
    if any(part is None for part in stored):
        return None
    names = {name for part in stored for name in part or ()}
    credits = {}
    for name in sorted(names):
        values = {
            key: value
            for part, keys in zip(stored, owners, strict=True)
            for key, value in zip(keys, (part or {})[name], strict=True)
        }
        credits[name] = [values[key] for key in own]
    return credits
