"""The records of a diagnosis. Numbers are nats a token where nothing else is said."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

from okd_lightning.metrics import GradientFidelity

Verdict: TypeAlias = Literal["good", "look", "bad"]
"""Whether a check is as it should be, deserves a look, or has to be mended first."""


@dataclass(frozen=True)
class Check:
    """One check of the data or the tokenizer.

    Attributes:
        name: What was looked at.
        verdict: How it is.
        text: What was found, in a sentence.
    """

    name: str
    verdict: Verdict
    text: str


@dataclass(frozen=True)
class Estimate:
    """A mean over tokens.

    Attributes:
        mean: Of the values.
        error: Its standard error, over responses: tokens of one response are not independent.
    """

    mean: float
    error: float

    def text(self, digits: int = 3) -> str:
        """``0.653±0.012``."""
        error = "" if math.isnan(self.error) else f"±{self.error:.{digits}f}"
        return f"{self.mean:.{digits}f}{error}"

    def signed(self, digits: int = 3) -> str:
        """``-0.053±0.004``, with a sign: of a change."""
        return f"{'+' if self.mean >= 0 else ''}{self.text(digits)}"


@dataclass(frozen=True)
class PositionBin:
    """A stretch of places in the response.

    Attributes:
        first: First place, from 1.
        last: Last place.
        tokens: How many tokens stand there.
        reverse_kl: Their mean.
        forward_kl: Their mean.
        share: Of all reverse KL, how much sits there.
    """

    first: int
    last: int
    tokens: int
    reverse_kl: float
    forward_kl: float
    share: float


@dataclass(frozen=True)
class Rows:
    """What was measured on one kind of responses.

    Attributes:
        source: Who wrote them: "given", "student" or "teacher".
        rows: Responses.
        tokens: Loss tokens.
        mean_length: Tokens a response.
        eos_share: Responses that end by themselves.
        measures: Mean by name: forward_kl, reverse_kl, jsd, agreement, student_entropy,
            teacher_entropy, cross_entropy of the student.
        top_k: k → teacher's mass on the student's k likeliest ids.
        bins: By place in the response.
        top_tenth: Share of all reverse KL that sits on the tenth of the tokens with most of it.
    """

    source: str
    rows: int
    tokens: int
    mean_length: float
    eos_share: float
    measures: Mapping[str, Estimate]
    top_k: Mapping[int, Estimate]
    bins: tuple[PositionBin, ...]
    top_tenth: float


@dataclass(frozen=True)
class EstimatorFinding:
    """One way to get a divergence's gradient.

    Attributes:
        divergence: Its name.
        estimator: "exact", a variant of OPD/OPD+, or "top-k".
        fidelity: Against the exact gradient on the same rollouts.
    """

    divergence: str
    estimator: str
    fidelity: GradientFidelity


@dataclass(frozen=True)
class GradientFinding:
    """Bias and noise of the estimators.

    Attributes:
        estimators: One row each.
        batches: Batches that were looked at.
        rows: Responses a batch.
        parameters: Numbers of the student that gradients were taken of.
        of_parameters: Trained numbers that it has.
    """

    estimators: tuple[EstimatorFinding, ...]
    batches: int
    rows: int
    parameters: int
    of_parameters: int

    def of(self, divergence: str, estimator: str) -> GradientFidelity | None:
        """One row's numbers."""
        found = (
            e for e in self.estimators if (e.divergence, e.estimator) == (divergence, estimator)
        )
        return next((e.fidelity for e in found), None)


@dataclass(frozen=True)
class Drift:
    """How far some optimizer steps move the student on responses that it wrote before them.

    Attributes:
        steps: Simulated steps.
        mean_log_ratio: Mean of |ln ρ|, ρ = p_new / p_old of the drawn token.
        outside: Share of tokens with ρ outside 0.8 to 1.25.
        effective_share: (Σρ)² / (n Σρ²), the share of tokens that an importance weight leaves.
    """

    steps: int
    mean_log_ratio: float
    outside: float
    effective_share: float


@dataclass(frozen=True)
class Trial:
    """Where some optimizer steps of one method lead.

    Attributes:
        method: Its name.
        steps: That were taken.
        change: Of held-out divergences, after less before, by responses and measure
            ("given/forward_kl", "student/reverse_kl"); errors are those of paired differences.
    """

    method: str
    steps: int
    change: Mapping[str, Estimate]


@dataclass(frozen=True)
class Cost:
    """What an optimizer step takes here.

    Attributes:
        seconds: By kind of step, measured: "KD" (given responses), "GKD" and "OPD+" (the
            student's own, their writing included), "writing" alone.
        rows: Sequences an optimizer step.
        prompts: Prompts an optimizer step of rollouts.
        tokens_per_second: Written by the student.
        memory: Bytes, by what they hold; weights, gradients and optimizer are counted, "peak" is
            measured.
        device: What it was measured on.
    """

    seconds: Mapping[str, float]
    rows: int
    prompts: int
    tokens_per_second: float
    memory: Mapping[str, int]
    device: str


@dataclass(frozen=True)
class Advice:
    """One recommendation.

    Attributes:
        title: What to do.
        because: The numbers that led to it, in a sentence.
        confidence: "measured" where the numbers themselves say so, "likely" where they do in
            comparable studies, "guess" where it is experience.
        methods: What a comparison should try for it, as ``compare --methods`` names them.
    """

    title: str
    because: str
    confidence: str
    methods: tuple[str, ...] = ()


@dataclass(frozen=True)
class Diagnosis:
    """Everything that was found.

    Attributes:
        student: What it is, in words.
        teacher: What it is, in words.
        checks: Of data and tokenizer.
        rows: Given, the student's own and the teacher's.
        gradients: Bias and noise.
        drift: After some numbers of steps.
        trials: Where a few steps of each of several methods lead.
        cost: Of a step.
        part: Of the data: what was held out, "val" or "train".
        learning_rate: That the simulated steps were made with.
        schedule: The run's.
        seed: Of everything that is drawn.
    """

    student: str
    teacher: str
    checks: tuple[Check, ...]
    rows: tuple[Rows, ...]
    gradients: GradientFinding
    drift: tuple[Drift, ...]
    trials: tuple[Trial, ...]
    cost: Cost
    part: str
    learning_rate: float
    schedule: str
    seed: int

    def of(self, source: str) -> Rows | None:
        """What was measured on responses of one kind."""
        return next((rows for rows in self.rows if rows.source == source), None)

    def forecast(self, measure: str) -> tuple[Trial, ...]:
        """All trials, the one that lowers a measure most first.

        Args:
            measure: Such as "given/forward_kl"; trials without it are left out.
        """
        measured = [trial for trial in self.trials if measure in trial.change]
        return tuple(sorted(measured, key=lambda trial: trial.change[measure].mean))


def to_record(found: Any) -> Any:
    """A record as JSON holds it: what is not a number there is null."""
    if not isinstance(found, (dict, list, tuple, float)):
        return (
            found if isinstance(found, (str, int, bool, type(None))) else to_record(asdict(found))
        )
    if isinstance(found, float):
        return found if math.isfinite(found) else None
    if isinstance(found, dict):
        return {str(name): to_record(value) for name, value in found.items()}
    return [to_record(value) for value in found]
