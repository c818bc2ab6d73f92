"""Generation of responses on all ranks: requests to the engine, and agreement after it.

Each rank generates alone, for minutes. An error or a stop on one rank stops all ranks: if one
stopped by itself, the others would wait in their next collective call. Also owns the request to
stop a run, which may come during generation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

from okd_lightning.engines.engine import ProgressFactory, RolloutEngine
from okd_lightning.errors import PreemptedError, RolloutTimeoutError, WorkerError
from okd_lightning.records.noise import NoiseStream
from okd_lightning.records.requests import Generator, Progress, Request, Rollout
from okd_lightning.records.sampling import Sampling
from okd_lightning.rollouts.order import Turn

_T = TypeVar("_T")
_MOST_PROMPTS = 5


@dataclass
class StopRequest:
    """A request to this process to stop.

    Attributes:
        is_made: Set by a signal handler.
        deadline: Time (``time.monotonic``) until which a checkpoint may wait for responses that
            are under way; None for no limit.
        can_come: Whether anything in the run can make it; else generation does not look for it.
    """

    is_made: bool = False
    deadline: float | None = None
    can_come: bool = True


class _AbandonedError(Exception):
    """Interrupts an engine during generation."""


def one_rank(state: Any) -> list[Any]:
    """Collect one object of the only rank."""
    return [state]


@dataclass(frozen=True)
class Agreement:
    """Exchange of outcomes between the ranks of a run after generation.

    Attributes:
        gather: Collects one object of every rank, on every rank.
        stop: This rank's request to stop.
    """

    gather: Callable[[Any], list[Any]] = one_rank
    stop: StopRequest = field(default_factory=StopRequest)

    def progress(self, shown: Progress | None) -> Progress | None:
        """Return a progress callback that also interrupts the engine on a stop request.

        None where nothing is shown and no request can come.
        """
        if shown is None and not self.stop.can_come:
            return None

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
            raise PreemptedError("the run was asked to stop while responses were generated")
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
            f"the engine did not answer in time while the {request.generator} generated responses "
            "to "
            f"{len(prompts)} prompts (rows {rows}{f' and {more} more' if more > 0 else ''} of the "
            f"data){f': {error}' if str(error) else ''}; check the engine and resume, or generate "
            "less at once (--data.prompts_per_rollout, --data.max_response_length)"
        ) from error


@dataclass(frozen=True)
class Generation:
    """Responses of a run's models to its prompts.

    Attributes:
        engine: Generates the student's and the teacher's responses.
        sampling: Temperature, top-k and top-p.
        max_new_tokens: Longest response, in tokens.
        seed: Keys the sampling noise.
        agreement: Exchange of outcomes between ranks, and this rank's request to stop.
        progress: Shows the progress; None for no display.
    """

    engine: RolloutEngine
    sampling: Sampling
    max_new_tokens: int
    seed: int
    agreement: Agreement
    progress: ProgressFactory | None = None

    def request(
        self, generator: Generator, turns: Sequence[Turn], epoch: int, told: Progress | None = None
    ) -> Request:
        """Return the request for the responses of one model.

        Args:
            generator: The model.
            turns: The prompts.
            epoch: Keys the sampling noise.
            told: Called with finished responses.
        """
        return Request(
            prompts=tuple(turn.example.prompt_for(generator, turn.sample) for turn in turns),
            sampling=self.sampling,
            noise=NoiseStream(self.seed, epoch),
            max_new_tokens=self.max_new_tokens,
            generator=generator,
            progress=told,
        )

    def respond(self, generator: Generator, turns: Sequence[Turn], epoch: int) -> Rollout:
        """Return the responses to this rank's prompts; call it within ``Agreement.together``.

        Raises:
            RolloutTimeoutError: The engine timed out.
        """
        with self.shown(f"{generator} generates", len(turns)) as told:
            request = self.request(generator, turns, epoch, told)
            with naming_the_prompts(request):
                return self.engine.respond(request)

    @contextmanager
    def shown(self, description: str, total: int) -> Iterator[Progress | None]:
        """Show a task within the context; yield its callback, which also heeds a stop request."""
        display = nullcontext() if self.progress is None else self.progress(description, total)
        with display as progress:
            yield self.agreement.progress(progress)
