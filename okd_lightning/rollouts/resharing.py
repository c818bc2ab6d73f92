"""Redistribution of stored rollouts to another number of ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

from okd_lightning.records.requests import Generator, Response, Rollout

RowKey: TypeAlias = tuple[int, int]
"""An optimizer step of the rollout batch, and the row's place in it over all ranks."""

Credits: TypeAlias = dict[str, list[float]] | None


def reshared(
    stored: Sequence[Mapping[Generator, Rollout]],
    owners: Sequence[Mapping[Generator, Sequence[RowKey]]],
    own: Mapping[Generator, Sequence[RowKey]],
) -> dict[Generator, Rollout]:
    """Return this rank's part of all ranks' responses of a rollout batch.

    Args:
        stored: Responses of each saving rank.
        owners: Their rows, in the same order.
        own: The rows of this rank.
    """
    found: dict[Generator, Rollout] = {}
    for generator, keys in own.items():
        rows: dict[RowKey, Response] = {}
        for part, part_keys in zip(stored, owners, strict=True):
            rollout = part.get(generator, Rollout())
            rows.update(zip(part_keys[generator], rollout, strict=True))
        if keys:
            found[generator] = Rollout(tuple(rows[key] for key in keys))
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
