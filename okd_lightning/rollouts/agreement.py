"""Agreement of ranks after generation: an error or a stop on one rank stops all ranks.

Each rank generates alone, for minutes; if one stopped by itself, the others would wait in their
next collective call. Also owns the request to stop a run, which may come during generation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from okd_lightning.errors import PreemptedError, RolloutTimeoutError, WorkerError
from okd_lightning.records.requests import Progress, Request

_T = TypeVar("_T")
_MOST_PROMPTS = 5


@dataclass
class StopRequest:
    """A request to this process to stop.

    Attributes:
        is_made: Set by a signal handler.
        deadline: Time (``time.monotonic``) until which a checkpoint may wait for responses that
            are under way; None for no limit.
    """

    is_made: bool = False
    deadline: float | None = None


class _AbandonedError(Exception):
    """Interrupts an engine during generation."""


def _alone(state: Any) -> list[Any]:
    return [state]


@dataclass(frozen=True)
class Agreement:
    """Exchange of outcomes between the ranks of a run after generation.

    Attributes:
        gather: Collects one object of every rank, on every rank.
        stop: This rank's request to stop.
    """

    gather: Callable[[Any], list[Any]] = _alone
    stop: StopRequest = field(default_factory=StopRequest)

    def progress(self, shown: Progress | None) -> Progress:
        """Return a progress callback that also interrupts the engine on a stop request."""

        def report(rows: int, tokens: int = 0) -> None:
            if shown is not None:
                shown(rows, tokens)
            if self.stop.is_made:
                raise _AbandonedError

        return report

    def together(self, generate: Callable[[], _T]) -> _T:
        """Return the result of ``generate`` if it succeeded on every rank.

        Args:
            generate: All generation before the next collective call; every rank calls this.

        Raises:
            RolloutTimeoutError: An engine timed out, on this or another rank.
            WorkerError: A process that generates has ended, on this or another rank.
            PreemptedError: A rank was requested to stop; the responses are discarded.
        """
        problem: RolloutTimeoutError | WorkerError | None = None
        results: list[_T] = []
        try:
            results.append(generate())  # also after a stop request: a sharded model needs all ranks
        except _AbandonedError:
            pass
        except (RolloutTimeoutError, WorkerError) as error:
            problem = error
        text = None if problem is None else str(problem)
        outcomes = self.gather((self.stop.is_made, isinstance(problem, WorkerError), text))
        late = [(rank, *found) for rank, (_, *found) in enumerate(outcomes) if found[1] is not None]
        if late:
            rank, is_worker, text = late[0]
            where = f"rank {rank}: " if len(outcomes) > 1 else ""
            kind = WorkerError if is_worker else RolloutTimeoutError
            raise kind(f"{where}{text}") from problem
        if any(is_made for is_made, *_ in outcomes):
            raise PreemptedError("the run was asked to stop while responses were written")
        return results[0]


@contextmanager
def naming_the_prompts(request: Request) -> Iterator[None]:
    """Add the prompts and the remedy to an engine's timeout.

    Raises:
        RolloutTimeoutError: The block raised a TimeoutError.
    """
    try:
        yield
    except TimeoutError as error:
        if isinstance(error, RolloutTimeoutError):
            raise
        prompts = request.prompts
        rows = ", ".join(str(prompt.index) for prompt in prompts[:_MOST_PROMPTS])
        more = len(prompts) - _MOST_PROMPTS
        raise RolloutTimeoutError(
            f"the engine did not answer in time while the {request.generator} wrote to "
            f"{len(prompts)} prompts (rows {rows}{f' and {more} more' if more > 0 else ''} of the "
            f"data){f': {error}' if str(error) else ''}; see to the engine and resume, or have it "
            "write less at once (--data.prompts_per_rollout, --data.max_response_length)"
        ) from error
