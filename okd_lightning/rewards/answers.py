"""Final answers in a text, and comparison of two texts' answers.

Patterns are those of the ``regex`` package, which has the syntax of ``re`` and can stop a search
after a time limit: nested repetition such as ``(a+)+b`` can take years on one response.
"""

from __future__ import annotations

import re
import warnings
from typing import Any, Literal, TypeAlias, get_args

import regex

from okd_lightning.errors import ConfigError
from okd_lightning.rewards.math_answers import is_same_answer

Comparison: TypeAlias = Literal["text", "math"]
"""Comparison of two answers: as texts, or by their mathematical value."""

_MARKED_ANSWER = regex.compile(r"####(.+)")
_SECONDS = 1.0
_SHARED_FLAGS = re.IGNORECASE | re.MULTILINE | re.DOTALL | re.VERBOSE
"""Flags with the same number in both packages."""

Pattern: TypeAlias = "regex.Pattern[str] | re.Pattern[str]"


def answer_pattern(pattern: str | None) -> regex.Pattern[str] | None:
    """Compile a pattern whose first group is the answer; None stays None.

    Raises:
        ConfigError: The pattern is not a regular expression, or has no group.
    """
    if pattern is None:
        return None
    try:
        compiled = regex.compile(pattern)
    except (regex.error, RecursionError, OverflowError) as error:
        raise ConfigError(f"pattern {pattern!r} is not a regular expression: {error}") from error
    if compiled.groups < 1:
        raise ConfigError(f"pattern {pattern!r} needs a group (...) that holds the answer")
    return compiled


def final_answer(text: str, pattern: Pattern | None) -> str | None:
    """Return a response's answer: the first group of the pattern's last match, or the whole text.

    Returns:
        Without surrounding white space; None where the pattern does not occur, or where the search
        takes more than a second, with a warning.
    """
    if pattern is None:
        return text.strip()
    timed: Any = pattern
    if isinstance(pattern, re.Pattern):  # ``re`` searches cannot be stopped
        timed = regex.compile(pattern.pattern, pattern.flags & _SHARED_FLAGS)
    try:
        found = [
            match.group(1)
            for match in timed.finditer(text, timeout=_SECONDS)
            if match.group(1) is not None
        ]
    except TimeoutError:
        warnings.warn(
            f"pattern {pattern.pattern!r} takes more than {_SECONDS:g} second on a response of "
            f"{len(text):,} characters, which counts as one without an answer; write it without "
            "nested repetition",
            stacklevel=2,
        )
        return None
    return found[-1].strip() if found else None


def checked_comparison(compare: str) -> Comparison:
    """Check the name of a comparison.

    Raises:
        ConfigError: There is no such comparison.
    """
    for known in get_args(Comparison):
        if compare == known:
            return known
    raise ConfigError(f"compare is {compare!r}; expected one of {', '.join(get_args(Comparison))}")


def matches(
    response: str,
    reference: str,
    pattern: Pattern | None = None,
    compare: Comparison = "text",
) -> bool:
    """Return whether a response gives the reference's answer; False for a response without one.

    Args:
        response: The generated text.
        reference: The text with the right answer.
        pattern: Extracts the answer from both. Without one, a mathematical answer is the text after
            the last ####, or else what math-verify finds in the text.
        compare: As texts, or by mathematical value.
    """
    answer, wanted = final_answer(response, pattern), final_answer(reference, pattern)
    if answer is None or wanted is None:
        return False
    if compare == "text" or answer == wanted:
        return answer == wanted
    if pattern is None:
        answer, wanted = (final_answer(text, _MARKED_ANSWER) or text for text in (answer, wanted))
    return is_same_answer(answer, wanted)
