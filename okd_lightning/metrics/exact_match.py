"""Exact match of answers, as text."""

from __future__ import annotations

import re


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
