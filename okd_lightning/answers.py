"""Final answers in a text, and whether two texts give the same one."""

from __future__ import annotations

import re

from okd_lightning.errors import ConfigError


def answer_pattern(pattern: str | None) -> re.Pattern[str] | None:
    """A compiled pattern whose first group is the answer; None stays None.

    Raises:
        ConfigError: It is no regular expression, or has no group.
    """
    if pattern is None:
        return None
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"pattern {pattern!r} is no regular expression: {error}") from error
    if compiled.groups < 1:
        raise ConfigError(f"pattern {pattern!r} needs a group (...) that holds the answer")
    return compiled


def final_answer(text: str, pattern: re.Pattern[str] | None) -> str | None:
    """The answer in a response: the first group of the pattern's last match, or the whole text.

    Returns:
        Without surrounding white space; None where the pattern does not occur.
    """
    if pattern is None:
        return text.strip()
    found = list(pattern.finditer(text))
    return found[-1].group(1).strip() if found else None


def matches(response: str, reference: str, pattern: re.Pattern[str] | None = None) -> bool:
    """Whether a response gives the reference's answer; a response without one does not."""
    answer = final_answer(response, pattern)
    return answer is not None and answer == final_answer(reference, pattern)
