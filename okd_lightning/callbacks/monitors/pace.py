"""How fast a run goes, and how long it will still take.

A chunk's responses are written at once and then trained on for some steps, so that seconds a step
say little within the first chunk: what is written is counted by the steps that it is for, and all
else (training, validation, checkpoints) by the steps that were done.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Pace:
    """The seconds of one process's part of a run.

    Args:
        clock: Seconds from wherever.

    Attributes:
        written_to: The optimizer step before which nothing more has to be written.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.start(0)

    def start(self, step: int) -> None:
        """A run begins, or goes on, with ``step`` optimizer steps done."""
        self._began = self._clock()
        self._first_step = self._step = step
        self._written_from: int | None = None
        self.written_to = step
        self._writing = self._training = 0.0
        self._tokens = 0
        self._batch_began: float | None = None

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Within it responses for training are written."""
        began = self._clock()
        try:
            yield
        finally:
            self._writing += self._clock() - began

    def batch_begins(self, chunk_end: int) -> None:
        """A micro-batch is there, and all of its chunk, which ends before a step, is written."""
        if self._written_from is None:  # what a run had written before it was stopped took no time
            self._written_from = self._step if self._writing else chunk_end
        self.written_to = chunk_end
        self._batch_began = self._clock()

    def batch_ends(self, step: int, tokens: int) -> None:
        """It is done, as are ``step`` optimizer steps, and ``tokens`` more were trained on."""
        if self._batch_began is not None:
            self._training += self._clock() - self._batch_began
        self._step = step
        self._tokens += tokens

    @property
    def elapsed(self) -> float:
        """Seconds since the start, of all kinds."""
        return self._clock() - self._began

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens trained on a second, of all kinds; None before the first step's end."""
        return self._tokens / max(self.elapsed, 1e-9) if self._tokens else None

    @property
    def training_tokens_per_second(self) -> float | None:
        """Tokens trained on a second of training alone; None before the first step's end."""
        return self._tokens / max(self._training, 1e-9) if self._tokens else None

    def seconds_left(self, num_steps: float) -> float | None:
        """Until ``num_steps`` steps are done; None where that cannot be said (yet).

        Args:
            num_steps: Optimizer steps of the whole run; infinity where it has no end.
        """
        num_done = self._step - self._first_step
        if not num_done or not math.isfinite(num_steps):
            return None
        left = (self.elapsed - self._writing) / num_done * (num_steps - self._step)
        num_written = self.written_to - (self._written_from or 0)
        if num_written > 0:
            left += self._writing / num_written * max(0.0, num_steps - self.written_to)
        return max(0.0, left)
