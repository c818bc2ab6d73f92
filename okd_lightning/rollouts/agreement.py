"""Ranks that write responses stop together: what befalls one of them is heard by all.

Each rank writes alone, for minutes; a rank that gave up by itself would leave the others waiting in
their next collective call. Owns the request to stop a run, too, which may come while one writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from okd_lightning.engines.engine import Author, Progress
from okd_lightning.errors import PreemptedError, RolloutTimeoutError
from okd_lightning.records.batches import PromptBatch

_T = TypeVar("_T")
_MOST_PROMPTS = 5


@dataclass
class StopRequest:
    """Whether this process was asked to stop.

    Attributes:
        is_made: Set by a signal's handler.
    """

    is_made: bool = False


class _AbandonedError(Exception):
    """Leaves an engine in the middle of its work."""


def _alone(state: Any) -> list[Any]:
    return [state]


@dataclass(frozen=True)
class Agreement:
    """What the ranks of a run tell one another when they have written.

    Attributes:
        gather: Collects one object of every rank, on every rank.
        stop: This rank's request to stop.
    """

    gather: Callable[[Any], list[Any]] = _alone
    stop: StopRequest = field(default_factory=StopRequest)

    def progress(self, shown: Progress | None) -> Progress:
        """Told how the writing goes; leaves the engine where a stop is asked for."""

        def tell(rows: int, tokens: int = 0) -> None:
            if shown is not None:
                shown(rows, tokens)
            if self.stop.is_made:
                raise _AbandonedError

        return tell

    def together(self, write: Callable[[], _T]) -> _T:
        """What ``write`` returns, where it has gone well on every rank.

        Args:
            write: All that is written before the next collective call; every rank calls this.

        Raises:
            RolloutTimeoutError: An engine timed out, here or on another rank.
            PreemptedError: Some rank was asked to stop; nothing that was written is to be kept.
        """
        problem: RolloutTimeoutError | None = None
        written: list[_T] = []
        try:
            written.append(write())  # also where a stop is asked for: models may be in shards
        except _AbandonedError:
            pass
        except RolloutTimeoutError as error:
            problem = error
        outcomes = self.gather((self.stop.is_made, None if problem is None else str(problem)))
        late = [(rank, text) for rank, (_, text) in enumerate(outcomes) if text is not None]
        if late:
            rank, text = late[0]
            where = f"rank {rank}: " if len(outcomes) > 1 else ""
            raise RolloutTimeoutError(where + text) from problem
        if any(is_made for is_made, _ in outcomes):
            raise PreemptedError("the run was asked to stop while responses were written")
        return written[0]


@contextmanager
def naming_the_prompts(author: Author, prompts: PromptBatch) -> Iterator[None]:
    """An engine's timeout, with what it was writing and what to do.

    Raises:
        RolloutTimeoutError: Around a TimeoutError of the block.
    """
    try:
        yield
    except TimeoutError as error:
        if isinstance(error, RolloutTimeoutError):
            raise
        rows = ", ".join(map(str, prompts.index[:_MOST_PROMPTS]))
        more = len(prompts) - _MOST_PROMPTS
        raise RolloutTimeoutError(
            f"the engine did not answer in time while the {author} wrote to {len(prompts)} prompts "
            f"(rows {rows}{f' and {more} more' if more > 0 else ''} of the data)"
            f"{f': {error}' if str(error) else ''}; see to the engine and resume, or have it write "
            "less at once (--data.prompts_per_rollout, --data.max_response_length)"
        ) from error
