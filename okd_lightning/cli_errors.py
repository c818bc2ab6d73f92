"""One formatter: whatever went wrong, as one line that says what to do."""

from __future__ import annotations


def readable(error: Exception) -> str:
    """The message of an error, on one line."""
    return " ".join(str(error).split())
