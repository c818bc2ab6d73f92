"""Sums over the rest of a response."""

from __future__ import annotations

import torch

from okd_lightning.records.shapes import RowMask, RowValues


def reward_to_go(rewards: RowValues, mask: RowMask, discount: float) -> RowValues:
    """G_k = Σ_{n≥k} γ^(n-k) r_n over the tokens of each row whose mask is True.

    Args:
        rewards: [rows, tokens] r, any unit.
        mask: [rows, tokens] True where a token counts; the others are skipped, not discounted.
        discount: γ in [0, 1].

    Returns:
        [rows, tokens], zero where the mask is False.
    """
    kept = rewards.where(mask, 0.0)
    total = torch.zeros_like(kept)
    running = kept.new_zeros(kept.shape[0])
    for position in reversed(range(kept.shape[1])):
        is_in = mask[:, position]
        running = torch.where(is_in, kept[:, position] + discount * running, running)
        total[:, position] = running.where(is_in, 0.0)
    return total
