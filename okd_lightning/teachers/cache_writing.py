"""Writing of a teacher's cache: the teacher runs over the rows of this rank's files."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import torch

from okd_lightning.errors import ModelError
from okd_lightning.losses import Side
from okd_lightning.losses.end_outcome import EndOutcome
from okd_lightning.losses.projection import slices, tile_size
from okd_lightning.records.batches import DistillBatch
from okd_lightning.records.collation import collate
from okd_lightning.teachers.store import Entry, to_records

Reader: TypeAlias = Callable[[DistillBatch], Side]
"""Computes the teacher's side at the loss tokens of some rows."""


def write_entry(
    entry: Entry,
    read: Reader,
    *,
    batch_size: int,
    device: torch.device,
    own: Callable[[int], bool],
    progress: Callable[[int], None] | None = None,
) -> None:
    """Run the teacher over the rows of this rank's files, and write the files.

    Args:
        entry: A prepared entry; existing files are kept.
        read: Runs the teacher.
        batch_size: Rows per forward pass.
        device: The teacher's device.
        own: Function from a file's number to whether this rank writes it.
        progress: Called with the number of finished rows.

    Raises:
        ModelError: The teacher's log-probabilities are NaN.
    """
    for number, part in enumerate(entry.layout.parts):
        if not own(number) or entry.has_part(number):
            continue
        records = np.empty(part.num_positions, entry.record)
        done = 0
        for rows in slices(len(part.rows), batch_size):
            found = _records(collate(part.rows[rows]).to(device), read, entry)
            records[done : done + len(found)] = found
            done += len(found)
            if progress is not None:
                progress(rows.stop - rows.start)
        entry.write_part(number, records)


@torch.no_grad()
def _records(batch: DistillBatch, read: Reader, entry: Entry) -> np.ndarray:
    """Return [positions] records of a batch, from full distributions by tiles."""
    side, targets = read(batch), batch.teacher_reads.targets
    vocab_size = entry.key["vocabulary"][0]
    tiles = []
    for tile in slices(len(side.hidden), tile_size(vocab_size, side.hidden.device)):
        ends = EndOutcome(side.end_ids, side.hidden.device)
        logprobs = ends.merge(side.head(side.hidden[tile])).log_softmax(-1)
        if logprobs.isnan().any():
            raise ModelError(
                "--model.teacher gives NaN for a row of the data, so that nothing can be learned "
                "from it; check its weights and --model.teacher_dtype"
            )
        tiles.append(to_records(logprobs, ends.outcomes(targets[tile]), entry.record))
    return np.concatenate(tiles)
