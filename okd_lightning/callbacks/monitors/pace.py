"""Speed and remaining time of a run.

A rollout batch is generated at once and then used for some steps, so seconds per step are not
meaningful within the first rollout batch. Generation is therefore divided by the steps that it is
for, and all else (training, checkpoints) by the finished steps. Validation and sample tables, which
come at intervals, are not counted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Pace:
    """Timer of one process's part of a run.

    Args:
        clock: Returns seconds, from any origin.

    Attributes:
        written_to: The optimizer step up to which responses are generated.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.start(0)

    def start(self, step: int) -> None:
        """Start a run, or resume it with ``step`` finished optimizer steps."""
        self._began = self._clock()
        self._stopped = 0.0
        self.is_stopped = False
        self._first_step = self._step = step
        self._written_from: int | None = None
        self.written_to = step
        self._writing = self._training = 0.0
        self._tokens = 0
        self._batch_began: float | None = None

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Count the time within the context as generation for training."""
        if self.is_stopped:
            yield
            return
        began = self._clock()
        try:
            yield
        finally:
            self._writing += self._clock() - began

    def batch_begins(self, chunk_end: int) -> None:
        """Record the start of a micro-batch, whose rollout batch ends before step ``chunk_end``."""
        if self._written_from is None:  # restored responses took no time in this process
            self._written_from = self._step if self._writing else chunk_end
        self.written_to = chunk_end
        self._batch_began = self._clock()

    def batch_ends(self, step: int, tokens: int) -> None:
        """Record its end, with the finished optimizer steps and the tokens trained on since."""
        if self._batch_began is not None:
            self._training += self._clock() - self._batch_began
        self._step = step
        self._tokens += tokens

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Exclude the time within the context from all figures but ``elapsed``."""
        if self.is_stopped:
            yield
            return
        began, self.is_stopped = self._clock(), True
        try:
            yield
        finally:
            self._stopped += self._clock() - began
            self.is_stopped = False

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return self._clock() - self._began

    @property
    def counted(self) -> float:
        """Seconds since the start, without those in ``stopped``."""
        return self.elapsed - self._stopped

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens trained on per counted second; None before the first step's end."""
        return self._tokens / max(self.counted, 1e-9) if self._tokens else None

    @property
    def training_tokens_per_second(self) -> float | None:
        """Tokens trained on per second of training only; None before the first step's end."""
        return self._tokens / max(self._training, 1e-9) if self._tokens else None

    def seconds_left(self, num_steps: float) -> float | None:
        """Return the seconds until ``num_steps`` steps are finished; None if unknown.

        Args:
            num_steps: Optimizer steps of the whole run; infinity if it has no end.
        """
        num_done = self._step - self._first_step
        if not num_done or not math.isfinite(num_steps):
            return None
        left = (self.counted - self._writing) / num_done * (num_steps - self._step)
        num_written = self.written_to - (self._written_from or 0)
        if num_written > 0:
            left += self._writing / num_written * max(0.0, num_steps - self.written_to)
        return max(0.0, left)
