"""What one run of a comparison came to, and the files that say so."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class RunResult:
    """One method's run.

    Attributes:
        method: Its name.
        seconds: Training and rollouts, without warm start, validation and imports.
        steps: Optimizer steps.
        tokens: Loss tokens trained on.
        generated_tokens: Tokens that a model wrote for it.
        before: Metrics before the first step, by name.
        after: The same after the last.
        history: (step, metrics) of every validation between; in metrics.csv, not in results.json.
    """

    method: str
    seconds: float
    steps: int
    tokens: int
    generated_tokens: int
    before: Mapping[str, float]
    after: Mapping[str, float]
    history: Sequence[tuple[int, Mapping[str, float]]] = field(default_factory=list)

    @property
    def curve(self) -> list[tuple[int, Mapping[str, float]]]:
        """All measured points, from step 0 to the last."""
        return [(0, self.before), *self.history]


def write_results(path: Path, results: Sequence[RunResult]) -> None:
    """``results.json``: a list of runs, without their histories."""
    records = [
        {
            "method": result.method,
            "seconds": round(result.seconds, 3),
            "steps": result.steps,
            "tokens": result.tokens,
            "generated_tokens": result.generated_tokens,
            "before": dict(result.before),
            "after": dict(result.after),
        }
        for result in results
    ]
    path.write_text(json.dumps(records, indent=2) + "\n")


def write_metrics_csv(path: Path, results: Sequence[RunResult]) -> None:
    """``metrics.csv``: one row a validation, of all runs."""
    names = sorted({name for result in results for _, metrics in result.curve for name in metrics})
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "step", *names])
        for result in results:
            for step, metrics in result.curve:
                writer.writerow([result.method, step, *(metrics.get(name, "") for name in names)])
