"""Rewards: one number per response, from its text; group baselines over a prompt's samples."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import regex
import torch

from okd_lightning.errors import ConfigError, RewardError
from okd_lightning.records.requests import Chat
from okd_lightning.rewards.answers import (
    Comparison,
    answer_pattern,
    checked_comparison,
    final_answer,
    matches,
)
from okd_lightning.rewards.rouge import rouge_l
from okd_lightning.tools.tool_calls import match_tool_calls

GroupBaseline: TypeAlias = Literal["none", "group_mean", "leave_one_out"]
"""Baseline that is subtracted from a response's reward: see ``baselined``."""


@dataclass(frozen=True)
class ScoredRow:
    """A response to score.

    Attributes:
        prompt: Text of the prompt; a chat as the run's template renders it.
        response: The student's own text, without special tokens.
        reference: The dataset response; empty where the dataset has none.
        chat: Messages and tools of the prompt; None if it is plain text.
    """

    prompt: str
    response: str
    reference: str = ""
    chat: Chat | None = None


class RewardFunction(ABC):
    """Abstract reward: a number for every response, larger is better.

    A complete one:

        class Brevity(RewardFunction):
            def __call__(self, prompts, responses, references):
                return [-float(len(response)) for response in responses]

    Attributes:
        reads_last_turn: Part of a response with tool calls that the function gets: the student's
            last turn, or (False) all of the student's turns, joined by line breaks. Tool results
            are never included.
        max_failures: Share of the latest 100 responses without a score above which a run stops.
    """

    reads_last_turn: bool = False
    max_failures: float = 1.0

    @abstractmethod
    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], references: Sequence[str]
    ) -> Sequence[float]:
        """Score responses.

        Args:
            prompts: Texts of the prompts.
            responses: The student's own text, without special tokens.
            references: The dataset responses; empty texts where the dataset has none.

        Returns:
            One number per response, any unit; NaN for a response that could not be scored.
        """

    def score(self, rows: Sequence[ScoredRow]) -> Sequence[float]:
        """Score responses with the chat and reference of their prompts; by default from the texts.

        Args:
            rows: The responses.
        """
        return self(
            [row.prompt for row in rows],
            [row.response for row in rows],
            [row.reference for row in rows],
        )

    def open(self, device: torch.device) -> None:
        """Load models or open connections for scoring, before a run trains; nothing by default.

        Args:
            device: The device of the run.

        Raises:
            OKDLightningError: A model or server that cannot be used.
        """
        del device

    def new_scores(self) -> Mapping[str, float]:
        """Return the scores to remember that this rank has found since the last call, by key."""
        return {}

    def remember(self, scores: Mapping[str, float]) -> None:
        """Take scores of all ranks, or of a checkpoint, so that they are not requested again."""
        del scores

    @property
    def remembered(self) -> Mapping[str, float]:
        """Scores to store in a checkpoint; none by default."""
        return {}


class PlainFunction(RewardFunction):
    """A plain Python function of one prompt, response and reference as a reward.

    Functions can be given from Python only: a config names a ``RewardFunction`` class.

    Raises:
        ConfigError: ``function`` cannot be called.
    """

    def __init__(self, function: object) -> None:
        if not callable(function):
            raise ConfigError(
                f"function is {function!r}; expected a RewardFunction, such as AnswerMatch, or (in "
                "Python) a function of prompt, response and reference"
            )
        self.function: Callable[[str, str, str], float] = function

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], references: Sequence[str]
    ) -> Sequence[float]:
        """Call the function once per response."""
        return [self.function(*row) for row in zip(prompts, responses, references, strict=True)]


class AnswerMatch(RewardFunction):
    r"""Reward 1 where a response (its last turn) gives the reference's answer, else 0.

    Args:
        pattern: A regular expression whose first group is the answer (the last match counts), such
            as '#### (.+)'; None takes whole responses.
        compare: "text" for the same characters; "math" for the same mathematics (math-verify):
            1,234 is 1234.00, and \frac12 is 0.5. Without a pattern it finds the answer itself:
            after the last ####, in \boxed{}, after "the answer is", or the last number.

    Raises:
        ConfigError: The pattern is not a regular expression, or has no group; an unknown compare.
    """

    reads_last_turn = True

    def __init__(self, pattern: str | None = None, compare: Comparison = "text") -> None:
        self.pattern: regex.Pattern[str] | None = answer_pattern(pattern)
        self.compare = checked_comparison(compare)

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], references: Sequence[str]
    ) -> Sequence[float]:
        """Return 0 or 1 per response; NaN where the reference gives no answer."""
        del prompts
        return [
            math.nan
            if final_answer(wanted, self.pattern) is None
            else float(matches(response, wanted, self.pattern, self.compare))
            for response, wanted in zip(responses, references, strict=True)
        ]


class ToolCallMatch(RewardFunction):
    """Share of a response's tool calls that match the reference's, by name and arguments.

    A call counts half for its name and half for its arguments (action and argument match), over all
    turns; an extra or missing call counts as wrong. See ``tool_calls`` for the forms.

    Args:
        ordered: Compare calls in order; otherwise each with any call of the reference, as suits
            parallel calls.
    """

    def __init__(self, ordered: bool = True) -> None:
        self.ordered = ordered

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], references: Sequence[str]
    ) -> Sequence[float]:
        """Return a number from 0 to 1 per response; NaN where the reference has no calls."""
        del prompts
        pairs = zip(responses, references, strict=True)
        return [_call_match(response, wanted, self.ordered) for response, wanted in pairs]


class RougeL(RewardFunction):
    """ROUGE-L (F1) of a response's last turn against the reference, in [0, 1].

    Args:
        stem: Compare words by their Porter stems, as the distillation papers do.
    """

    reads_last_turn = True

    def __init__(self, stem: bool = True) -> None:
        self.stem = stem

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], references: Sequence[str]
    ) -> Sequence[float]:
        """Return F1 of the longest common subsequence of words, per response."""
        del prompts
        pairs = zip(responses, references, strict=True)
        return [rouge_l(response, reference, self.stem) for response, reference in pairs]


def checked_rewards(
    function: RewardFunction,
    prompts: Sequence[str],
    responses: Sequence[str],
    references: Sequence[str],
    chats: Sequence[Chat | None] = (),
) -> list[float]:
    """Call a reward function and check its values.

    Args:
        function: The function.
        prompts: Texts of the prompts.
        responses: The student's own texts.
        references: The dataset responses, or empty texts.
        chats: Messages of the prompts; () for none.

    Returns:
        One number per response; NaN where it is not finite, for the caller to count.

    Raises:
        RewardError: The function raised, returned another number of values, or a value that is not
            a number.
    """
    name = type(function).__name__
    if not responses:
        return []
    columns = (prompts, responses, references, chats or [None] * len(responses))
    rows = [ScoredRow(*row) for row in zip(*columns, strict=True)]
    try:
        values = list(function.score(rows))
    except Exception as error:
        raise RewardError(
            f"reward {name} raised {type(error).__name__}: {error}; it was given "
            f"{len(responses)} responses, the first of them {responses[0][:60]!r}"
        ) from error
    if len(values) != len(responses):
        raise RewardError(
            f"reward {name} returned {len(values)} values for {len(responses)} responses; "
            "expected one number per response"
        )
    return [
        _number(value, name, response) for value, response in zip(values, responses, strict=True)
    ]


def baselined(
    rewards: Sequence[float], groups: Sequence[Hashable], baseline: GroupBaseline
) -> list[float]:
    """Return advantages: rewards minus a baseline over the samples of the same prompt.

    ``group_mean`` subtracts the mean of the group, the sample itself included (Shao et al., arXiv
    2402.03300, without its division by the standard deviation). ``leave_one_out`` subtracts the
    mean of the others, which leaves the expected gradient unchanged (Ahmadian et al., arXiv
    2402.14740).

    Args:
        rewards: One number per response; NaN for one that could not be scored.
        groups: The prompt (and its turn) that each response answers.
        baseline: The baseline to subtract.

    Returns:
        One advantage per response: 0 where the reward is NaN, and where a baseline needs other
            samples but the group has a single scored one.
    """
    totals: dict[Hashable, float] = defaultdict(float)
    counts: dict[Hashable, int] = defaultdict(int)
    for reward, group in zip(rewards, groups, strict=True):
        if not math.isnan(reward):
            totals[group] += reward
            counts[group] += 1

    def credit(reward: float, group: Hashable) -> float:
        if math.isnan(reward):
            return 0.0
        if baseline == "none":
            return reward
        if counts[group] == 1:
            return 0.0
        if baseline == "group_mean":
            return reward - totals[group] / counts[group]
        return reward - (totals[group] - reward) / (counts[group] - 1)

    return [credit(reward, group) for reward, group in zip(rewards, groups, strict=True)]


def _number(value: object, name: str, response: str) -> float:
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError) as error:  # the last: a multi-element Tensor
        raise RewardError(
            f"reward {name} returned {value!r} for the response {response[:60]!r}; "
            "expected a number"
        ) from error
    return number if math.isfinite(number) else math.nan


def _call_match(response: str, reference: str, ordered: bool) -> float:
    shares = match_tool_calls(response, reference, ordered)
    return math.nan if shares is None else (shares.names + shares.arguments) / 2
