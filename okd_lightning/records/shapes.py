"""Axis names as jaxtyping aliases; the test run checks every annotated call.

Axes: ``batch`` rows, ``seq`` tokens of a row, ``vocab`` token ids, ``hidden`` model width,
``positions`` all loss tokens of a batch, flattened. ``*lead``: any leading axes.
"""

from __future__ import annotations

from typing import TypeAlias

from jaxtyping import Bool, Float, Int
from torch import Tensor

LogProbs: TypeAlias = Float[Tensor, "*lead vocab"]
"""Log-probabilities over the vocabulary (nats, each last axis sums to one in probability)."""

PerToken: TypeAlias = Float[Tensor, "*lead"]
"""One number per token."""

LogRatio: TypeAlias = Float[Tensor, "*any"]
"""log q - log p, teacher minus student, in nats: the lambda of the formulas."""

RatioValues: TypeAlias = Float[Tensor, "*any"]
"""A function of the log-ratio, element by element."""

PerId: TypeAlias = Float[Tensor, "*lead vocab"]
"""One number for every id of the vocabulary."""

OutcomeLogProbs: TypeAlias = Float[Tensor, "*lead outcomes"]
"""Log-probabilities over fewer outcomes than ids; an outcome is one id or a group of ids."""

OutcomeIds: TypeAlias = Int[Tensor, "*lead k"]
"""Ids that are single outcomes, without repeats in a row."""

IdMask: TypeAlias = Bool[Tensor, "*lead vocab"]
"""One flag for every id of the vocabulary."""

DrawnIds: TypeAlias = Int[Tensor, "*lead"]
"""Ids of the sampled tokens."""

TokenIds: TypeAlias = Int[Tensor, "batch seq"]
TokenMask: TypeAlias = Bool[Tensor, "batch seq"]
"""True = the token counts in the loss."""

RowValues: TypeAlias = Float[Tensor, "rows tokens"]
"""One number per sampled token, each row's tokens in sampling order."""

RowMask: TypeAlias = Bool[Tensor, "rows tokens"]

PositionHidden: TypeAlias = Float[Tensor, "positions hidden"]
PositionIds: TypeAlias = Int[Tensor, " positions"]
PositionValues: TypeAlias = Float[Tensor, " positions"]
PositionMask: TypeAlias = Bool[Tensor, " positions"]
