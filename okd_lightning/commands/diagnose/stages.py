"""Stages of a diagnosis: skipped ones, expected times, and progress."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol, TypeVar

from okd_lightning.errors import UsageError

RESPONSES, DIVERGENCES, ROLLOUTS = "responses", "divergences", "rollouts"
GRADIENTS, STEPS, TRIALS = "gradients", "steps", "trials"

SKIPPABLE: Mapping[str, str] = {
    GRADIENTS: "bias and noise of sampled gradients",
    STEPS: "drift of earlier rollouts, seconds and memory of a step",
    TRIALS: "some steps of each of several methods",
}
"""Stages that ``--skip`` can name, and their findings."""

_EVERY_SECONDS = 10.0
Element = TypeVar("Element")


class StageProgress(Protocol):
    """Function to call with the progress of a stage."""

    def __call__(self, done: float, total: float, of: tuple[int, int] = (0, 1)) -> None:
        """Report progress.

        Args:
            done: Finished parts.
            total: All parts.
            of: (index, number) of the equal share of the stage that these parts are.
        """


def skipped_stages(text: str | None) -> frozenset[str]:
    """Return the stages in a list such as ``gradients,trials``.

    Raises:
        UsageError: A name that is not a stage, or cannot be left out.
    """
    names = [name.strip() for name in (text or "").split(",") if name.strip()]
    for name in names:
        if name not in SKIPPABLE:
            listed = ", ".join(f"{stage} ({found})" for stage, found in SKIPPABLE.items())
            raise UsageError(f"--skip {name}: expected one or more of: {listed}")
    return frozenset(names)


class Stages:
    """Clock and progress messages of the stages.

    Args:
        say: Called with messages.
        clock: Seconds from any start.

    Attributes:
        seconds: Seconds of each finished stage.
    """

    def __init__(
        self, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.say, self._clock = say, clock
        self.seconds: dict[str, float] = {}

    @contextmanager
    def run(self, name: str, what: str) -> Iterator[StageProgress]:
        """Time a stage, and yield a function to call with the done and all parts of it.

        It says how far the stage is, and how long it will take from its pace, every ten seconds.
        """
        start = last = self._clock()
        self.say(f"{name}: {what}")

        def progress(done: float, total: float, of: tuple[int, int] = (0, 1)) -> None:
            nonlocal last
            now, share = self._clock(), (of[0] + done / total) / of[1]
            if now - last >= _EVERY_SECONDS and 0 < share < 1:
                last = now
                left = (now - start) * (1 - share) / share
                self.say(f"{name}: {share:.0%}, about {duration(left)} left")

        yield progress
        self.seconds[name] = self.seconds.get(name, 0.0) + self._clock() - start


def followed(
    elements: Iterable[Element], total: int, progress: Callable[[float, float], None]
) -> Iterator[Element]:
    """Yield elements, and report each as done when the next one is asked for."""
    for number, element in enumerate(elements):
        yield element
        progress(number + 1, total)


def duration(seconds: float) -> str:
    """Format as ``8 s`` or ``3 min``."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min"


def expectation(seconds: Mapping[str, float]) -> str:
    """Return the sentence that names the expected time, by stage, longest first."""
    by_stage: Sequence[tuple[str, float]] = sorted(seconds.items(), key=lambda one: -one[1])
    total = sum(seconds.values())
    listed = ", ".join(f"{name} {duration(value)}" for name, value in by_stage)
    longest = [name for name, _ in by_stage if name in SKIPPABLE]
    if total < 60 or not longest:
        return f"expected time: about {duration(total)}"
    return (
        f"expected time: about {duration(total)} ({listed}); --skip {longest[0]} leaves a stage "
        "out, --rows and --batches make all shorter"
    )
