"""Results of one run of a comparison, and their files."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from okd_lightning.durable_files import write_json, write_whole


@dataclass(frozen=True)
class Point:
    """One validation of a run, with the run's cost at that point.

    Attributes:
        step: Optimizer steps.
        tokens: Loss tokens trained on.
        seconds: Seconds of training and rollouts.
        metrics: Measures by name.
        cpu_seconds: CPU time of this process, over its threads.
    """

    step: int
    tokens: int
    seconds: float
    metrics: Mapping[str, float]
    cpu_seconds: float = 0.0

    def to_record(self) -> dict[str, Any]:
        """Return the record for files and checkpoints."""
        return {**vars(self), "metrics": dict(self.metrics)}


@dataclass(frozen=True)
class RunResult:
    """One method's run.

    Attributes:
        method: Name of the method.
        seconds: Seconds of training and rollouts, without warm start, validation and imports.
        steps: Optimizer steps.
        tokens: Loss tokens trained on.
        generated_tokens: Tokens generated for the run.
        before: Metrics before the first step, by name.
        after: Metrics after the last step.
        history: Every validation after the first step; in metrics.csv, not in results.json.
        seed: The run's seed; None where runs differ by their method alone.
        cpu_seconds: Like ``seconds``, in CPU time of this process over its threads.
    """

    method: str
    seconds: float
    steps: int
    tokens: int
    generated_tokens: int
    before: Mapping[str, float]
    after: Mapping[str, float]
    history: Sequence[Point] = field(default_factory=list)
    seed: int | None = None
    cpu_seconds: float = 0.0

    @property
    def points(self) -> list[Point]:
        """All validations, from step 0 to the last."""
        return [Point(0, 0, 0.0, self.before), *self.history]

    @property
    def curve(self) -> list[tuple[int, Mapping[str, float]]]:
        """Steps and metrics of all validations."""
        return [(point.step, point.metrics) for point in self.points]

    def to_record(self) -> dict[str, Any]:
        """Return the run's entry in ``results.json``: everything but the history."""
        seed = {} if self.seed is None else {"seed": self.seed}
        return {
            "method": self.method,
            **seed,
            "seconds": round(self.seconds, 3),
            "cpu_seconds": round(self.cpu_seconds, 3),
            "steps": self.steps,
            "tokens": self.tokens,
            "generated_tokens": self.generated_tokens,
            "before": dict(self.before),
            "after": dict(self.after),
        }

    @classmethod
    def from_record(
        cls, record: Mapping[str, Any], history: Sequence[Mapping[str, Any]]
    ) -> RunResult:
        """Read the record of ``to_record``, with the records of its points."""
        return cls(**record, history=[Point(**point) for point in history])


def write_results(path: Path, results: Sequence[RunResult]) -> None:
    """Write ``results.json``: a list of runs, without their histories."""
    write_json(path, [result.to_record() for result in results])


def write_metrics_csv(path: Path, results: Sequence[RunResult]) -> None:
    """Write ``metrics.csv``: one row per validation, of all runs."""
    names = sorted({name for result in results for _, metrics in result.curve for name in metrics})
    rows: list[list[Any]] = [["method", "seed", "step", "tokens", "seconds", "cpu_seconds", *names]]
    for result in results:
        for point in result.points:
            seconds = [round(point.seconds, 3), round(point.cpu_seconds, 3)]
            cost = [point.step, point.tokens, *seconds]
            measured = [point.metrics.get(name, "") for name in names]
            rows.append([result.method, result.seed, *cost, *measured])
    write_csv(path, rows)


def write_csv(path: Path, rows: Sequence[Sequence[Any]]) -> None:
    """Write a CSV file atomically; None is an empty cell."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    write_whole(path, text.getvalue().encode())


def write_table_csv(path: Path, results: Sequence[RunResult]) -> None:
    """Write ``results.csv``: one row per run, with all measures before and after."""
    names = sorted({name for result in results for name in (*result.before, *result.after)})
    costs = ("steps", "seconds", "cpu_seconds", "tokens", "generated_tokens")
    rows: list[list[Any]] = [
        ["method", "seed", *costs, *(f"{when} {n}" for when in ("before", "after") for n in names)]
    ]
    for result in results:
        own = [getattr(result, cost) for cost in costs]
        both = [m.get(name, "") for m in (result.before, result.after) for name in names]
        rows.append([result.method, result.seed, *own, *both])
    write_csv(path, rows)
