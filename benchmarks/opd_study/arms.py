"""One run of the study: a task, a method with its settings, and the length of training."""

from __future__ import annotations

from dataclasses import dataclass, replace

FORWARD, REVERSE, JSD = "ForwardKL", "ReverseKL", "JensenShannon"
DIVERGENCES = (REVERSE, FORWARD, JSD)


@dataclass(frozen=True)
class Arm:
    """One run.

    Attributes:
        task: "tinystories" or "arithmetic".
        name: Name of the method with its settings; unique with task, steps, rows, rate and seed.
        options: Command-line options of the method: ``--method`` and its settings.
        steps: Optimizer steps.
        rows: Sequences per optimizer step.
        rate: Learning rate.
        samples: Responses per prompt.
        seed: Seed of data order and sampling.
    """

    task: str
    name: str
    options: tuple[str, ...]
    steps: int = 200
    rows: int = 16
    rate: float = 1e-3
    samples: int = 1
    seed: int = 0

    @property
    def setting(self) -> str:
        """Setting by which a table groups runs."""
        samples = f" x {self.samples} samples" if self.samples > 1 else ""
        return f"{self.task}, {self.steps} steps of {self.rows} rows{samples}, rate {self.rate:g}"

    @property
    def key(self) -> str:
        """Key under which the run is kept."""
        return f"{self.setting} / {self.name} / seed {self.seed}"


def opd(divergence: str, clip: float | None = None, task: str = "tinystories") -> Arm:
    """Return an arm with the stopped reward, as commonly run."""
    return _sampled(task, "OPD", divergence, "", (), clip)


def opd_plus(
    divergence: str,
    variant: str = "centred",
    clip: float | None = None,
    task: str = "tinystories",
) -> Arm:
    """Return an arm with the corrected advantage."""
    options = ("--method.variant", variant)
    return _sampled(task, "OPDPlus", divergence, f" {variant}", options, clip)


def gkd(divergence: str, task: str = "tinystories") -> Arm:
    """Return an arm with the exact loss on on-policy samples."""
    options = ("--method", "GKD", "--method.divergence", divergence)
    options += ("--method.on_policy_fraction", "1.0")
    return Arm(task, f"GKD {divergence}", options)


def on_arithmetic(arm: Arm, rate: float = 3e-3, steps: int = 300) -> Arm:
    """Return the method on the quickstart's rows, in fewer steps."""
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
