"""One run of the study: a task, a method with its settings, and how long it learns."""

from __future__ import annotations

from dataclasses import dataclass, replace

FORWARD, REVERSE, JSD = "ForwardKL", "ReverseKL", "JensenShannon"
DIVERGENCES = (REVERSE, FORWARD, JSD)
DEFAULT_NORMALIZATION = "running_mean"


def kept_under(key: str, normalization: str) -> str:
    """Add the divisor of sampled rows to a key of the JSON file; the default adds nothing."""
    return key if normalization == DEFAULT_NORMALIZATION else f"{key} / {normalization}"


@dataclass(frozen=True)
class Arm:
    """One run.

    Attributes:
        task: "tinystories" or "arithmetic".
        name: Of the method with its settings; with task, steps, rows, rate and seed it is unique.
        options: What the command line gets for it: ``--method`` and what belongs to it.
        steps: Optimizer steps.
        rows: Sequences an optimizer step.
        rate: Learning rate.
        samples: Responses to each prompt.
        seed: Of data order and sampling.
        normalization: Divisor of sampled rows, ``--model.normalization``.
    """

    task: str
    name: str
    options: tuple[str, ...]
    steps: int = 200
    rows: int = 16
    rate: float = 1e-3
    samples: int = 1
    seed: int = 0
    normalization: str = DEFAULT_NORMALIZATION

    @property
    def setting(self) -> str:
        """What a table puts together."""
        samples = f" x {self.samples} samples" if self.samples > 1 else ""
        budget = f"{self.steps} steps of {self.rows} rows{samples}, rate {self.rate:g}"
        return f"{self.task}, {budget}"

    @property
    def key(self) -> str:
        """Key of the run in the JSON file."""
        return kept_under(f"{self.setting} / {self.name} / seed {self.seed}", self.normalization)

    @property
    def start_key(self) -> str:
        """Key of the measures before the first step."""
        return kept_under(f"{self.task} / seed {self.seed}", self.normalization)


def opd(divergence: str, clip: float | None = None, task: str = "tinystories") -> Arm:
    """The stopped reward, as commonly run."""
    return _sampled(task, "OPD", divergence, "", (), clip)


def opd_plus(
    divergence: str,
    variant: str = "centred",
    clip: float | None = None,
    task: str = "tinystories",
) -> Arm:
    """The corrected credit."""
    options = ("--method.variant", variant)
    return _sampled(task, "OPDPlus", divergence, f" {variant}", options, clip)


def gkd(divergence: str, task: str = "tinystories") -> Arm:
    """The exact loss on the student's own responses."""
    options = ("--method", "GKD", "--method.divergence", divergence)
    options += ("--method.on_policy_fraction", "1.0")
    return Arm(task, f"GKD {divergence}", options)


def on_arithmetic(arm: Arm, rate: float = 3e-3, steps: int = 300) -> Arm:
    """The same method on the quickstart's rows, in fewer steps."""
    return replace(arm, task="arithmetic", steps=steps, rows=64, rate=rate)


def _sampled(
    task: str,
    method: str,
    divergence: str,
    variant: str,
    options: tuple[str, ...],
    clip: float | None,
) -> Arm:
    options = ("--method", method, "--method.divergence", divergence, *options)
    if clip is not None:
        options += ("--method.max_log_ratio", str(clip))
    clipped = "" if clip is None else f", clip {clip:g}"
    return Arm(task, f"{method} {divergence}{variant}{clipped}", options)
