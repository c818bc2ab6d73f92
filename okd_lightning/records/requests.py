"""Requests to an engine, and its responses.

A ``Request`` holds all that determines the responses to some prompts. An engine returns a
``Rollout``: one ``Response`` per prompt, in the order of the prompts.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias, overload

from okd_lightning.records.images import ImageRef
from okd_lightning.records.noise import NoiseStream
from okd_lightning.records.sampling import Sampling

Generator: TypeAlias = Literal["student", "teacher"]
"""Model that generates a response."""

STOP_REASONS: tuple[str, ...] = ("eos", "length", "turns")
"""Why a response ends: end-of-sequence id, length limit, or a call in its last allowed turn."""


@dataclass(frozen=True)
class Chat:
    """Messages and tools that a prompt was rendered from.

    Tool results are appended to it, and a reward model renders it by its own template.

    Attributes:
        messages: Messages before the response, as passed to the chat template.
        tools: JSON schemas of the tools, passed to the chat template; None for no tools.
    """

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] | None = None

    @property
    def question(self) -> str:
        """The last message of the user; empty without one that is text."""
        texts = [m.get("content") for m in self.messages if m.get("role") == "user"]
        return texts[-1] if texts and isinstance(texts[-1], str) else ""


@dataclass(frozen=True)
class Prompt:
    """One prompt of a request; (index, sample) keys its noise.

    Attributes:
        ids: Token ids that the response continues.
        index: The prompt's row in its dataset.
        sample: Number of this sample among the samples of its prompt, from 0.
        chat: Messages and tools of the prompt; None for plain text, whose response calls no tools.
        limit: Longest response, in tokens, where that is less than the request's; None otherwise.
        teacher: Number of the teacher that may answer it, where there are several; else -1.
        images: Its images, in the order of their places in ``ids``.
    """

    ids: tuple[int, ...]
    index: int
    sample: int = 0
    chat: Chat | None = None
    limit: int | None = None
    teacher: int = -1
    images: tuple[ImageRef, ...] = ()


def PromptBatch(  # noqa: N802 - a contract name
    input_ids: Sequence[tuple[int, ...]],
    index: Sequence[int],
    sample: Sequence[int],
    chats: Sequence[Chat | None] = (),
    limits: Sequence[int] = (),
) -> tuple[Prompt, ...]:
    """Return prompts from columns, for scripts that hold ids and numbers; see ``Prompt``.

    Args:
        input_ids: The prompts, ragged.
        index: The dataset row of each prompt.
        sample: Sample number of each prompt.
        chats: Messages and tools of the prompts; () for none.
        limits: Longest response of each prompt, in tokens; () for none.
    """
    none = (None,) * len(input_ids)
    columns = (input_ids, index, sample, chats or none, limits or none)
    return tuple(Prompt(*prompt) for prompt in zip(*columns, strict=True))


class Progress(Protocol):
    """Callback for progress during generation."""

    def __call__(self, rows: int, tokens: int = 0) -> None:
        """Report progress.

        Args:
            rows: Responses that have ended since the last call.
            tokens: Tokens generated since the last call, over all rows, approximately; 0 if the
                engine does not count them.
        """


@dataclass(frozen=True)
class Request:
    """One response to each of some prompts.

    Attributes:
        prompts: Any number; the engine sorts and batches them itself.
        sampling: Temperature, top-k and top-p; the log-probs of a response are of this
            distribution.
        noise: The noise, keyed by (seed, epoch, prompt, sample, position) only.
        max_new_tokens: Longest response; a cut response has no end-of-sequence id.
        generator: Model that generates, where there are two.
        progress: Called with finished responses; None for no calls.
    """

    prompts: tuple[Prompt, ...]
    sampling: Sampling
    noise: NoiseStream
    max_new_tokens: int
    generator: Generator = "student"
    progress: Progress | None = None

    @property
    def limits(self) -> list[int]:
        """Longest response to each prompt, in tokens."""
        longest = self.max_new_tokens
        return [longest if p.limit is None else min(p.limit, longest) for p in self.prompts]


@dataclass(frozen=True)
class ToolUse:
    """Counts of turns and tool calls in one response.

    Attributes:
        turns: Turns that the model generated.
        calls: Executed tool calls.
        errors: Executed calls that returned an error.
        cuts: Tool results that were cut at the response's limit.
    """

    turns: int = 1
    calls: int = 0
    errors: int = 0
    cuts: int = 0


@dataclass(frozen=True)
class Response:
    """One response of an engine.

    Attributes:
        ids: Ids after the prompt: the sampled ids with the end-of-sequence id where one was drawn,
            and tool results between turns.
        logprobs: Log-probability (nats) of each sampled id under the distribution it was drawn
            from (after temperature, top-k and top-p); 0 where an id was not sampled.
        stop_reason: One of ``STOP_REASONS``.
        mask: True on the sampled ids; by default on all.
        tool_use: Turns and calls, where tools could be called; else None.
        merges_ends: Whether the log-probability of a vocabulary's end id is that of all its end ids
            together, not of the sampled one alone.
    """

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    stop_reason: str
    mask: tuple[bool, ...] = ()
    tool_use: ToolUse | None = None
    merges_ends: bool = False

    def __post_init__(self) -> None:
        if not self.mask:
            object.__setattr__(self, "mask", (True,) * len(self.ids))

    @property
    def turns(self) -> list[tuple[int, ...]]:
        """Ids of each generated turn; one empty turn if there is none."""
        return [ids for ids, is_own in stretches(self.ids, self.mask) if is_own] or [()]


@dataclass(frozen=True)
class Rollout(Sequence[Response]):
    """The responses to a request, in the order of its prompts, and the engine's measurements.

    Attributes:
        responses: One per prompt.
        num_row_steps: Rows summed over all forward passes of the generation; 0 if unknown.
        engine_gap: Mean difference (nats) between the engine's log-probabilities of a few responses
            and the student's; None where the student itself generates.
    """

    responses: tuple[Response, ...] = ()
    num_row_steps: int = 0
    engine_gap: float | None = None

    def __len__(self) -> int:
        return len(self.responses)

    def __iter__(self) -> Iterator[Response]:
        return iter(self.responses)

    @overload
    def __getitem__(self, index: int) -> Response: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Response, ...]: ...
    def __getitem__(self, index: int | slice) -> Response | tuple[Response, ...]:
        return self.responses[index]

    @property
    def response_ids(self) -> tuple[tuple[int, ...], ...]:
        """Ids of each response, for scripts."""
        return tuple(response.ids for response in self.responses)

    @property
    def num_tokens(self) -> int:
        """Sampled tokens in all responses."""
        return sum(sum(response.mask) for response in self.responses)


def stretches(ids: Sequence[int], mask: Sequence[bool]) -> list[tuple[tuple[int, ...], bool]]:
    """Split a response into stretches of equal mask: (ids, whether the model sampled them)."""
    pairs = zip(ids, mask, strict=True)
    return [
        (tuple(token for token, _ in part), is_own)
        for is_own, part in itertools.groupby(pairs, key=operator.itemgetter(1))
    ]
