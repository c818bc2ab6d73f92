"""Generation while the weights change: its protocol, its answers, and an engine in a thread.

A request is begun with the present weights and answered later. ``worker_process`` is the other
engine: the built-in one, in a process of its own.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace

from okd_lightning.errors import WorkerError
from okd_lightning.records.requests import Progress, Request, Rollout

_POLL_SECONDS = 0.1
"""Interval at which a wait reports progress, which also ends it on a request to stop."""


@dataclass(frozen=True)
class Generated:
    """Responses that were generated ahead of training.

    Attributes:
        rollout: The responses.
        seconds: Seconds of their generation.
        cpu_seconds: CPU seconds of it in another process of this machine.
    """

    rollout: Rollout
    seconds: float
    cpu_seconds: float = 0.0


class Answer:
    """A request that is being answered in another thread or process."""

    def __init__(self) -> None:
        self._future: Future[Generated] = Future()
        self._rows = self._tokens = 0

    def report(self, rows: int, tokens: int = 0) -> None:
        """Count finished responses and new tokens; called by the generating thread or process."""
        self._rows += rows
        self._tokens += tokens

    def finish(self, generated: Generated) -> None:
        """Set the responses."""
        self._future.set_result(generated)

    def fail(self, error: BaseException) -> None:
        """Set the error that ``wait`` raises."""
        self._future.set_exception(error)

    @property
    def is_done(self) -> bool:
        """True if ``wait`` returns or raises at once."""
        return self._future.done()

    def wait(
        self,
        progress: Progress | None = None,
        until: Callable[[], float | None] = lambda: None,
    ) -> Generated | None:
        """Wait for the responses.

        Args:
            progress: Called with the progress since the last call, at least every 0.1 seconds; an
                error that it raises ends the wait and not the generation.
            until: Returns the time (``time.monotonic``) at which the wait ends, which may become
                known during the wait; None for no end.

        Returns:
            None if they were not finished in time.

        Raises:
            OKDLightningError: The generation has failed.
        """
        rows = tokens = 0
        while not self._future.done():
            if (end := until()) is not None and time.monotonic() >= end:
                return None
            if progress is not None:
                seen = self._rows, self._tokens
                progress(seen[0] - rows, seen[1] - tokens)
                rows, tokens = seen
            wait([self._future], _POLL_SECONDS)
        return self._future.result()


class AheadEngine(ABC):
    """Engine whose responses come from the weights at the time when a request was begun.

    Attributes:
        takes_turns: True if it has one set of weights: then a request may only be begun, and others
            may only generate with it, when all earlier requests of all ranks are answered.
    """

    takes_turns: bool = False

    @abstractmethod
    def begin(self, request: Request) -> Answer:
        """Copy the student's present weights and begin; requests are processed in order.

        Raises:
            OKDLightningError: The engine cannot take the weights.
        """

    @abstractmethod
    def close(self) -> None:
        """End the engine; unanswered requests are discarded."""


class ThreadEngine(AheadEngine):
    """Engine in a thread of this process, which waits for a server.

    Args:
        prepare: Function that transfers the present weights to a server and returns the function
            that generates.
    """

    takes_turns = True

    def __init__(self, prepare: Callable[[Request], Callable[[], Rollout]]) -> None:
        self._prepare = prepare
        self._is_closed = False

    def begin(self, request: Request) -> Answer:
        """See ``AheadEngine``; no earlier request may be unanswered."""
        answer = Answer()

        def report(rows: int, tokens: int = 0) -> None:
            if self._is_closed:
                raise WorkerError("the run has ended")
            answer.report(rows, tokens)

        generate = self._prepare(replace(request, progress=report))
        # a daemon: a run that stops does not wait for a server
        threading.Thread(target=_generate, args=(generate, answer), daemon=True).start()
        return answer

    def close(self) -> None:
        """End the thread after the response that it is waiting for."""
        self._is_closed = True


def _generate(generate: Callable[[], Rollout], answer: Answer) -> None:
    start = time.perf_counter()
    try:
        rollout = generate()
    except BaseException as error:  # noqa: BLE001  raised again by the thread that waits
        answer.fail(error)
    else:
        answer.finish(Generated(rollout, time.perf_counter() - start))
