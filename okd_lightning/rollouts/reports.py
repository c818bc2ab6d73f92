"""Metrics of rollout batches that wait for the next training batch, with which they are logged."""

from __future__ import annotations

from collections.abc import Mapping

from okd_lightning.records.requests import Rollout
from okd_lightning.records.rows import rollout_metrics


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
        """Return all metrics, and forget them."""
        metrics = rollout_metrics(self._rollouts) | self._values
        self._rollouts, self._values = [], {}
        return metrics
