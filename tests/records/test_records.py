"""Rows to batches.

Frozen here: padding is on the right and told by length; masks and sampler log-probs stand where
their tokens stand; the first id of a sequence never counts; a batch moves between devices as a
whole.
"""

from __future__ import annotations

import torch

from okd_lightning.records.batches import SOURCES, TrainingRow
from okd_lightning.records.collation import collate

ROWS = [
    TrainingRow(7, "student", (5, 6, 1, 1), (False, False, True, True), 2, (-0.5, -0.25)),
    TrainingRow(9, "dataset", (1, 8), (True, True), 1),
]


def test_collate():
    batch = collate(ROWS, pad_id=1)
    assert batch.input_ids.tolist() == [[5, 6, 1, 1], [1, 8, 1, 1]]
    assert batch.attention_mask.tolist() == [[True] * 4, [True, True, False, False]]
    assert batch.mask.tolist() == [[False, False, True, True], [True, True, False, False]]
    assert batch.sampler_logprobs.tolist() == [[0, 0, -0.5, -0.25], [0, 0, 0, 0]]
    assert [SOURCES[i] for i in batch.source.tolist()] == ["student", "dataset"]
    assert batch.index.tolist() == [7, 9]
    assert batch.prompt_lengths.tolist() == [2, 1]
    assert len(batch) == 2


def test_the_first_id_is_predicted_by_nothing():
    assert [row.num_loss_tokens for row in ROWS] == [2, 1]


def test_to_moves_every_tensor_and_keeps_the_rest():
    from dataclasses import replace

    batch = replace(collate(ROWS), step_counts=(1, 2, 0), metrics={"a": 1.0}).to("meta")
    tensors = [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 7
    assert all(tensor.device.type == "meta" for tensor in tensors)
    assert batch.step_counts == (1, 2, 0)
    assert batch.metrics == {"a": 1.0}
