"""Rewards: a number a response, from its text; and what a prompt's other samples take off it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import Literal, TypeAlias

import regex

from okd_lightning.errors import ConfigError, RewardError
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
"""What is subtracted from a response's reward: see ``baselined``."""


class RewardFunction(ABC):
    """A number for every response, larger is better; subclass it to bring your own.

    A complete one:

        class Brevity(RewardFunction):
            def __call__(self, prompts, responses, references):
                return [-float(len(response)) for response in responses]

    Attributes:
        reads_last_turn: What it is given of a response that called tools: the student's last turn,
            or (False) all of the student's turns, a line break between them. What tools answered
            is never among it.
    """

    reads_last_turn: bool = False

    @abstractmethod
    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], references: Sequence[str]
    ) -> Sequence[float]:
        """Score responses.

        Args:
            prompts: As text.
            responses: What the student wrote itself, as text without special tokens.
            references: The data set's own responses; empty texts where it has none.

        Returns:
            One number a response, any unit; NaN says that a response could not be scored.
        """


class PlainFunction(RewardFunction):
    """A plain Python function of one prompt, response and reference as a reward.

    Only Python can hand one over: a config names a ``RewardFunction`` class, never a function.

    Raises:
        ConfigError: It cannot be called.
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
        """One call a response."""
        return [self.function(*row) for row in zip(prompts, responses, references, strict=True)]


class AnswerMatch(RewardFunction):
    r"""1 where a response (its last turn) gives the reference's answer, else 0.

    Args:
        pattern: A regular expression whose first group is the answer (the last match counts), such
            as '#### (.+)'; None takes whole responses.
        compare: "text" for the same characters; "math" for the same mathematics (math-verify):
            1,234 is 1234.00, and \frac12 is 0.5. Without a pattern it finds the answer itself:
            behind the last ####, in \boxed{}, behind "the answer is", or the last number.

    Raises:
        ConfigError: The pattern is no regular expression, or has no group; an unknown compare.
    """

    reads_last_turn = True

    def __init__(self, pattern: str | None = None, compare: Comparison = "text") -> None:
        self.pattern: regex.Pattern[str] | None = answer_pattern(pattern)
        self.compare = checked_comparison(compare)

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], references: Sequence[str]
    ) -> Sequence[float]:
        """0 or 1; NaN where the reference gives no answer."""
        del prompts
        return [
            math.nan
            if final_answer(wanted, self.pattern) is None
            else float(matches(response, wanted, self.pattern, self.compare))
            for response, wanted in zip(responses, references, strict=True)
        ]


class ToolCallMatch(RewardFunction):
    """Share of a response's tool calls that are the reference's, by name and arguments.

    Half of a call is its name, half its arguments (action and argument match), over all turns; a
    call too many or too few counts as wrong. See ``tool_calls`` for the forms.

    Args:
        ordered: Compare calls in order; otherwise each with any call of the reference, as suits
            parallel calls.
    """

    def __init__(self, ordered: bool = True) -> None:
        self.ordered = ordered

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], references: Sequence[str]
    ) -> Sequence[float]:
        """Between 0 and 1; NaN where the reference calls nothing."""
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
        """F1 of the longest common subsequence of words."""
        del prompts
        pairs = zip(responses, references, strict=True)
        return [rouge_l(response, reference, self.stem) for response, reference in pairs]


def checked_rewards(
    function: RewardFunction,
    prompts: Sequence[str],
    responses: Sequence[str],
    references: Sequence[str],
) -> list[float]:
    """What a reward function says, checked.

    Returns:
        One number a response; NaN where it is not finite, for the caller to count.

    Raises:
        RewardError: It raised, returned another number of values, or something that is no number.
    """
    name = type(function).__name__
    if not responses:
        return []
    try:
        values = list(function(prompts, responses, references))
    except Exception as error:
        raise RewardError(
            f"reward {name} raised {type(error).__name__}: {error}; it was given "
            f"{len(responses)} responses, the first of them {responses[0][:60]!r}"
        ) from error
    if len(values) != len(responses):
        raise RewardError(
            f"reward {name} returned {len(values)} values for {len(responses)} responses; "
            "expected one number a response"
        )
    return [
        _number(value, name, response) for value, response in zip(values, responses, strict=True)
    ]


def baselined(
    rewards: Sequence[float], groups: Sequence[Hashable], baseline: GroupBaseline
) -> list[float]:
    """Rewards minus what the samples of the same prompt have in common.

    ``group_mean`` subtracts the mean of the group, the sample itself included (Shao et al.,
    arXiv 2402.03300, without its division by the standard deviation); ``leave_one_out`` the mean
    of the others, which leaves the expected gradient as it is (Ahmadian et al., arXiv 2402.14740).

    Args:
        rewards: One a response; NaN for one that could not be scored.
        groups: Which prompt (and which turn of it) each response answers.
        baseline: What is subtracted.

    Returns:
        One credit a response: 0 where the reward is NaN, and where a group has a single scored
        sample but a baseline needs others.
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
    except (TypeError, ValueError, RuntimeError) as error:  # the last: a Tensor of several numbers
        raise RewardError(
            f"reward {name} returned {value!r} for the response {response[:60]!r}; "
            "expected a number"
        ) from error
    return number if math.isfinite(number) else math.nan


def _call_match(response: str, reference: str, ordered: bool) -> float:
    shares = match_tool_calls(response, reference, ordered)
    return math.nan if shares is None else (shares.names + shares.arguments) / 2
