"""Records of a diagnosis. Numbers are in nats per token where no other unit is named."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeAlias

from okd_lightning.metrics import GradientFidelity

Verdict: TypeAlias = Literal["good", "look", "bad"]
"""Result of a check: fine, deserves attention, or has to be fixed first."""


@dataclass(frozen=True)
class Check:
    """One check of the data or the tokenizer.

    Attributes:
        name: The checked property.
        verdict: The result.
        text: The finding, in a sentence.
    """

    name: str
    verdict: Verdict
    text: str


@dataclass(frozen=True)
class Estimate:
    """A mean over tokens.

    Attributes:
        mean: Mean of the values.
        error: Standard error over responses: tokens of one response are not independent.
    """

    mean: float
    error: float

    def text(self, digits: int = 3) -> str:
        """Format as ``0.653±0.012``."""
        error = "" if math.isnan(self.error) else f"±{self.error:.{digits}f}"
        return f"{self.mean:.{digits}f}{error}"

    def signed(self, digits: int = 3) -> str:
        """Format a change with its sign, such as ``-0.053±0.004``."""
        return f"{'+' if self.mean >= 0 else ''}{self.text(digits)}"


@dataclass(frozen=True)
class PositionBin:
    """A range of positions in the response.

    Attributes:
        first: First position, from 1.
        last: Last position.
        tokens: Number of tokens at these positions.
        reverse_kl: Mean reverse KL of these tokens.
        forward_kl: Mean forward KL of these tokens.
        share: Share of the total reverse KL at these positions.
    """

    first: int
    last: int
    tokens: int
    reverse_kl: float
    forward_kl: float
    share: float


@dataclass(frozen=True)
class Rows:
    """Measures on one kind of responses.

    Attributes:
        source: "given" (dataset responses), or the generator: "student" or "teacher".
        rows: Number of responses.
        tokens: Loss tokens.
        mean_length: Tokens per response.
        eos_share: Share of responses that end by themselves.
        measures: Mean by name: forward_kl, reverse_kl, jsd, agreement, student_entropy,
            teacher_entropy, cross_entropy of the student.
        top_k: k → teacher's mass on the student's k most likely ids.
        bins: By position in the response.
        top_tenth: Share of the total reverse KL on the 10 % of the tokens with the highest values.
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
    """One estimator of a divergence's gradient.

    Attributes:
        divergence: Name of the divergence.
        estimator: "exact", "exact, top 16", or a variant of OPD/OPD+.
        fidelity: Against the exact gradient on the same rollouts.
    """

    divergence: str
    estimator: str
    fidelity: GradientFidelity


@dataclass(frozen=True)
class GradientFinding:
    """Bias and noise of the estimators.

    Attributes:
        estimators: One entry per estimator.
        batches: Number of measured batches.
        rows: Responses per batch.
        parameters: Number of student parameters whose gradients were taken.
        of_parameters: Number of trained student parameters.
        part: Their place in the student, such as "block 10 of 10".
        sketch: Numbers to which each gradient was reduced by a random sketch; None where all of it
            was kept.
    """

    estimators: tuple[EstimatorFinding, ...]
    batches: int
    rows: int
    parameters: int
    of_parameters: int
    part: str = "all trained parameters"
    sketch: int | None = None

    def of(self, divergence: str, estimator: str) -> GradientFidelity | None:
        """Return the numbers of one estimator."""
        found = (
            e for e in self.estimators if (e.divergence, e.estimator) == (divergence, estimator)
        )
        return next((e.fidelity for e in found), None)


@dataclass(frozen=True)
class Drift:
    """Effect of some optimizer steps on the student's probabilities of its earlier responses.

    Attributes:
        steps: Simulated steps.
        mean_log_ratio: Mean of |ln ρ|, ρ = p_new / p_old of the sampled token.
        outside: Share of tokens with ρ outside 0.8 to 1.25.
        effective_share: (Σρ)² / (n Σρ²), the effective share of tokens under importance weights.
    """

    steps: int
    mean_log_ratio: float
    outside: float
    effective_share: float


@dataclass(frozen=True)
class Trial:
    """Effect of some optimizer steps of one method.

    Attributes:
        method: Name of the method.
        steps: Number of steps.
        change: Of held-out divergences, after minus before, by responses and measure
            ("given/forward_kl", "student/reverse_kl"); errors are those of paired differences.
    """

    method: str
    steps: int
    change: Mapping[str, Estimate]


@dataclass(frozen=True)
class Cost:
    """Cost of an optimizer step on this machine.

    Attributes:
        seconds: By kind of step, measured: "KD" (dataset responses), "GKD" and "OPD+" (on-policy
            samples, generation included), "writing" (generation alone).
        rows: Sequences per optimizer step.
        prompts: Prompts per optimizer step of rollouts.
        tokens_per_second: Generated by the student.
        memory: Bytes, by what they hold; weights, gradients and optimizer are counted, "peak" is
            measured.
        device: Where it was measured.
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
        confidence: "measured" where the numbers of this pair show it, "likely" where those of
            comparable studies do, "guess" where it is experience.
        methods: Methods to compare for it, as ``compare --methods`` names them.
    """

    title: str
    because: str
    confidence: str
    methods: tuple[str, ...] = ()


@dataclass(frozen=True)
class Diagnosis:
    """All findings.

    Attributes:
        student: Description of the student.
        teacher: Description of the teacher.
        checks: Checks of data and tokenizer.
        rows: Measures on dataset responses, the student's responses and the teacher's.
        gradients: Bias and noise of gradient estimators.
        drift: Drift after several numbers of steps.
        trials: Effects of a few steps of each of several methods.
        cost: Cost of a step.
        part: The held-out part of the data, "val" or "train".
        learning_rate: Learning rate of the simulated steps.
        schedule: The run's schedule.
        seed: Seed of all random numbers.
        stage_seconds: Seconds of each stage.
        skipped: Stages that were left out (``--skip``); their findings are empty.
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
    stage_seconds: Mapping[str, float] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()

    def of(self, source: str) -> Rows | None:
        """Return the measures on responses of one kind."""
        return next((rows for rows in self.rows if rows.source == source), None)

    def forecast(self, measure: str) -> tuple[Trial, ...]:
        """Return all trials, the one that lowers a measure most first.

        Args:
            measure: Such as "given/forward_kl"; trials without it are left out.
        """
        measured = [trial for trial in self.trials if measure in trial.change]
        return tuple(sorted(measured, key=lambda trial: trial.change[measure].mean))


def to_record(found: Any) -> Any:
    """Convert a record for JSON: NaN and infinities become null."""
    if not isinstance(found, (dict, list, tuple, float)):
        return (
            found if isinstance(found, (str, int, bool, type(None))) else to_record(asdict(found))
        )
    if isinstance(found, float):
        return found if math.isfinite(found) else None
    if isinstance(found, dict):
        return {str(name): to_record(value) for name, value in found.items()}
    return [to_record(value) for value in found]
