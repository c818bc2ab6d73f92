"""Counts of an optimizer step's rows, lengths of rollouts, and the logged metrics of both.

The divisor of a step's sum must not depend on the step's own samples: a sum over sampled tokens
divided by their number is a ratio estimator, and biased (docs/opd.md). The divisor of rows that the
student sampled is therefore their number times the mean length of earlier rollout batches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from okd_lightning.records.batches import SOURCES, SampledCounts, TrainingRow
from okd_lightning.records.chunks import AlignedResponse
from okd_lightning.records.requests import Rollout, ToolUse

_STUDENT = SOURCES.index("student")

WINDOW_ROLLOUTS = 256
"""Approximate number of earlier rollouts in the mean; a larger batch dominates it."""


def count_chunks(rows: Sequence[TrainingRow]) -> Tensor:
    """Count the tokens of rows whose teacher has another tokenizer: [5, sources], int64.

    Returns:
        The teacher's tokens in chunks; the student's in responses; and of these, those that are one
        token of the teacher, that have no chunk, and whose chunk its tokenizer would segment
        differently.
    """
    counts = torch.zeros(5, len(SOURCES), dtype=torch.int64)
    for row in rows:
        found = row.aligned or AlignedResponse()
        own, others = (
            sum(end - start for start, end in spans)
            for spans in (
                [span.student for span in found.spans],
                [span.teacher for span in found.spans],
            )
        )
        total = own + found.num_unaligned + found.num_noncanonical
        numbers = [
            others,
            total,
            found.num_one_to_one,
            found.num_unaligned,
            found.num_noncanonical,
        ]
        counts[:, SOURCES.index(row.source)] += torch.tensor(numbers)
    return counts


def chunk_metrics(counts: Tensor) -> dict[str, float]:
    """Return logged shares of a step's response tokens, from ``count_chunks`` over all ranks."""
    total = max(1, int(counts[1].sum()))
    names = ("one_to_one", "unaligned", "noncanonical")
    shares = counts[2:].sum(-1) / total
    return {f"train/{name}_tokens": float(s) for name, s in zip(names, shares, strict=True)}


def by_teacher(
    rows: Sequence[TrainingRow], num_teachers: int, reduce_sum: Callable[[Tensor], Tensor]
) -> dict[str, Any]:
    """Return an optimizer step's counts by teacher, as fields of its batches.

    Args:
        rows: This rank's rows of the step.
        num_teachers: Teachers to choose from.
        reduce_sum: Sums an int64 tensor over all ranks.

    Returns:
        ``teacher_counts`` and ``teachers_present``.
    """
    counts = torch.zeros(num_teachers, len(SOURCES), dtype=torch.int64)
    for row in rows:
        counts[row.teacher, SOURCES.index(row.source)] += row.num_loss_tokens
    of_step = tuple(tuple(of_one) for of_one in reduce_sum(counts).tolist())
    present = tuple(number for number, of_one in enumerate(of_step) if any(of_one))
    return {"teacher_counts": of_step, "teachers_present": present}


@dataclass
class RolloutLengths:
    """Decayed sums over earlier rollout batches, and the sums of the current one.

    A batch of R rollouts multiplies the earlier sums by W/(W + R), W = ``WINDOW_ROLLOUTS``. All
    numbers come from integer sums over all ranks, in the order of training, so that they are equal
    on every rank and in every resumed run.

    Attributes:
        tokens: Loss tokens of earlier batches, decayed.
        rollouts: Rollouts of earlier batches, decayed.
        own_tokens: Loss tokens of the current batch.
        own_rollouts: Rollouts of the current batch.
        batch: Epoch of the current batch, and its first optimizer step in the epoch.
    """

    tokens: float = 0.0
    rollouts: float = 0.0
    own_tokens: int = 0
    own_rollouts: int = 0
    batch: list[int] = field(default_factory=list)

    def begin(self, epoch: int, first_step: int, counts: Tensor) -> None:
        """Set the current batch; the previous one joins the earlier ones. Repeats change nothing.

        Args:
            epoch: Epoch of the batch.
            first_step: Its first optimizer step in the epoch.
            counts: [2, sources] loss tokens and number of its rows over all ranks
                (``count_by_source``).
        """
        if self.batch != [epoch, first_step]:
            kept = WINDOW_ROLLOUTS / (WINDOW_ROLLOUTS + self.own_rollouts)
            self.tokens = self.tokens * kept + self.own_tokens
            self.rollouts = self.rollouts * kept + self.own_rollouts
            self.batch = [epoch, first_step]
        self.own_tokens, self.own_rollouts = counts[:, _STUDENT].tolist()

    def stamp(self, counts: Tensor, max_tokens: int) -> SampledCounts:
        """Return the counts of the student's responses in a step, for its batches.

        Args:
            counts: [2, sources] of the step, as in ``begin``.
            max_tokens: Longest allowed response, in tokens.
        """
        return SampledCounts(int(counts[1, _STUDENT]), self.mean, max_tokens)

    @property
    def mean(self) -> float:
        """Mean loss tokens per rollout of earlier batches; for the first batch, its own mean."""
        if self.rollouts and self.tokens:
            return self.tokens / self.rollouts
        return self.own_tokens / self.own_rollouts if self.own_rollouts else 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return all fields as plain numbers."""
        return {**vars(self), "batch": list(self.batch)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict``."""
        for name in vars(self):
            setattr(self, name, state[name])
        self.batch = list(state["batch"])


def rollout_metrics(rollouts: Sequence[tuple[Rollout, float]]) -> dict[str, float]:
    """Return logged metrics of rollouts: speed, lengths in tokens, shares that ended with eos.

    Tokens are sampled tokens; lengths include tool results. Utilisation is the share of row-steps
    (a row in a forward pass) that produced a token.

    Args:
        rollouts: Rollouts and their seconds; an empty sequence gives no metrics.
    """
    if not rollouts:
        return {}
    seconds = sum(time for _, time in rollouts)
    responses = [response for rollout, _ in rollouts for response in rollout.responses]
    of_tools = _tool_metrics([r.tool_use for r in responses if r.tool_use is not None])
    num_tokens = sum(rollout.num_tokens for rollout, _ in rollouts)
    lengths = [len(response.ids) for response in responses]
    ended = sum(response.stop_reason == "eos" for response in responses)
    num_row_steps = sum(rollout.num_row_steps for rollout, _ in rollouts)
    utilisation = {"rollout/utilisation": num_tokens / num_row_steps} if num_row_steps else {}
    gaps = [rollout.engine_gap for rollout, _ in rollouts if rollout.engine_gap is not None]
    return {
        "rollout/tokens_per_second": num_tokens / max(seconds, 1e-9),
        "rollout/tokens": float(num_tokens),
        "rollout/seconds": seconds,
        "rollout/mean_length": sum(lengths) / len(lengths),
        "rollout/eos_share": ended / len(lengths),
        "rollout/empty_share": lengths.count(0) / len(lengths),
        **of_tools,
        **utilisation,
        **({"rollout/engine_gap": max(gaps)} if gaps else {}),
    }


def _tool_metrics(uses: Sequence[ToolUse]) -> dict[str, float]:
    if not uses:
        return {}
    return {
        "rollout/tool_calls": float(sum(use.calls for use in uses)),
        "rollout/tool_errors": float(sum(use.errors for use in uses)),
        "rollout/tool_cuts": float(sum(use.cuts for use in uses)),
        "rollout/mean_turns": sum(use.turns for use in uses) / len(uses),
    }


class RolloutReports:
    """Speed, lengths, rewards and waits since the last training batch."""

    def __init__(self) -> None:
        self._rollouts: list[tuple[Rollout, float]] = []  # with the seconds that each took
        self._values: dict[str, float] = {}

    def add(self, rollout: Rollout, seconds: float) -> None:
        """Add a generated rollout and the seconds that it took."""
        self._rollouts.append((rollout, seconds))

    def note(self, values: Mapping[str, float]) -> None:
        """Set metrics by name."""
        self._values.update(values)

    def waited(self, seconds: float) -> None:
        """Add to the seconds in which training waited, which differ from those of generation."""
        name = "rollout/wait_seconds"
        self._values[name] = self._values.get(name, 0.0) + seconds

    def take(self) -> dict[str, float]:
        """Return all metrics, and reset them."""
        metrics = rollout_metrics(self._rollouts) | self._values
        self._rollouts, self._values = [], {}
        return metrics
