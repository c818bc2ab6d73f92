"""Measures that distinguish a healthy run from a failing one, and their thresholds.

Numbers only: ``health_warnings`` collects them and warns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

EXTREME_LOG_RATIO = 10.0
"""Nats; the teacher finds a token e^10 = 22,000 times less (or more) likely than the sampler."""

_NUM_FIRST = 3
"""Number of first examinations whose mean is the initial value; no warnings before."""

_KEPT = 0.7
"""Share of the smoothed value that an examination keeps."""

_RELIEF = 0.8
"""Share of its threshold below which a measure counts as healthy again."""


@dataclass(frozen=True)
class VitalSigns:
    """One examination of an optimizer step's on-policy samples, over all ranks.

    Attributes:
        entropy: Nats per token: the mean of -log p of the sampled tokens.
        mean_length: Tokens that the student generated, per response.
        truncated: Share of the responses that were cut at the longest length.
        outliers: Share of the sampled tokens with an extreme log-ratio; 0 where none is measured.
    """

    entropy: float
    mean_length: float
    truncated: float
    outliers: float = 0.0


@dataclass(frozen=True)
class Thresholds:
    """Thresholds of the checks; None disables a check. See ``HealthWarnings``."""

    entropy_share: float | None
    length_growth: float | None
    length_share: float
    truncated_share: float | None
    outlier_share: float | None


@dataclass(frozen=True)
class Surroundings:
    """Reference values for the measures of a run.

    Attributes:
        max_length: Longest response, in tokens.
        truncated: Share of the dataset responses that are cut there.
        excess: Reverse KL in nats per token: by how much less likely the teacher finds the
            student's responses than the student does; None where it is not measured.
    """

    max_length: int
    truncated: float = 0.0
    excess: float | None = None


class Course:
    """Measures over a run: initial, current (smoothed), and the problems found."""

    def __init__(self) -> None:
        self.num_looks = 0
        self.first: dict[str, float] = {}
        self.now: dict[str, float] = {}
        self.wrong: list[str] = []

    def state_dict(self) -> dict[str, Any]:
        """Return the whole state."""
        return {**vars(self), "first": dict(self.first), "now": dict(self.now)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state."""
        vars(self).update(state)

    def add(self, signs: VitalSigns) -> None:
        """Add one examination."""
        for name, value in vars(signs).items():
            if self.num_looks < _NUM_FIRST:
                known = self.first.get(name, 0.0)
                self.first[name] = known + (value - known) / (self.num_looks + 1)
            self.now[name] = _KEPT * self.now.get(name, value) + (1 - _KEPT) * value
        self.num_looks += 1

    def new_problems(self, limits: Thresholds, around: Surroundings) -> list[str]:
        """Return names of new problems; a problem that has disappeared can be returned again."""
        if self.num_looks < _NUM_FIRST:
            return []
        severity = dict(self._severities(limits, around))
        new = [name for name, value in severity.items() if value > 1 and name not in self.wrong]
        lasting = [name for name in self.wrong if severity.get(name, 0.0) > _RELIEF]
        self.wrong = lasting + new
        return new

    def _severities(self, limits: Thresholds, around: Surroundings) -> Iterator[tuple[str, float]]:
        """Yield each measure divided by its threshold: above 1 is a problem."""
        now, first = self.now, self.first
        if limits.entropy_share is not None and first["entropy"] > 0:
            shrunk = limits.entropy_share * first["entropy"] / max(now["entropy"], 1e-9)
            is_surer = around.excess is None or around.excess > now["entropy"]
            yield "entropy", shrunk if is_surer else 0.0
        if limits.length_growth is not None and first["mean_length"] > 0:
            grown = now["mean_length"] / (limits.length_growth * first["mean_length"])
            filled = now["mean_length"] / (limits.length_share * around.max_length)
            yield "length", min(grown, filled)
        if limits.truncated_share is not None:
            allowed = max(limits.truncated_share, min(1.0, around.truncated + 0.2))
            yield "truncated", now["truncated"] / allowed
        if limits.outlier_share is not None:
            yield "outliers", now["outliers"] / limits.outlier_share
