"""Typed access to the parts of a server's JSON answer; a wrong type is a ServerError.

Knows no protocol; the parts of an answer are defined in ``vllm_client``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from okd_lightning.errors import ServerError, one_line

ABOVE_ZERO = 1e-3
"""Allowed excess of a log-probability over 0 (nats) and of a sum of probabilities over 1: float16
rounding."""

_LEAST_LOGPROB = -1e30
_MOST_IDS = 2**31
_SHOWN = 200
_HINT = "is this an OpenAI-compatible vLLM server?"


def is_id(value: object) -> bool:
    """Return whether ``value`` can be a token id: an integer from 0 to 2^31 - 1."""
    return type(value) is int and 0 <= value < _MOST_IDS


def shown(value: object) -> str:
    """Return a value as text for a message; long values are cut before they are formatted."""
    if isinstance(value, dict):
        return "an object with " + (", ".join(repr(k)[:40] for k in list(value)[:5]) or "nothing")
    if isinstance(value, list):
        return f"a list of {len(value)}" + (f" from {shown(value[0])} on" if value else "")
    return repr(value[:_SHOWN]) if isinstance(value, str) else repr(value)[:_SHOWN]


@dataclass(frozen=True)
class AnswerPart:
    """A part of an answer; every method raises a ServerError for a wrong type.

    Attributes:
        value: The JSON value.
        at: Option, address and path within the answer, for messages.
    """

    value: Any
    at: str

    def wrong(self, got: str, expected: str, hint: str = _HINT) -> ServerError:
        """Return the error for this part."""
        return ServerError(
            f"{self.at} answers with {one_line(got, _SHOWN)} where {expected} is expected; {hint}"
        )

    def member(self, name: str) -> AnswerPart:
        """Return a required member of an object."""
        if not isinstance(self.value, dict) or name not in self.value:
            raise self.wrong(shown(self.value), f"an object with {name!r}")
        return AnswerPart(self.value[name], f"{self.at} ({name})")

    def items(self) -> list[AnswerPart]:
        """Return the items of a list."""
        if not isinstance(self.value, list):
            raise self.wrong(shown(self.value), "a list")
        return [AnswerPart(value, self.at) for value in self.value]

    def text(self) -> str:
        """Return the text."""
        if not isinstance(self.value, str):
            raise self.wrong(shown(self.value), "text")
        return self.value

    def optional(self, name: str, kind: type[Any]) -> Any:
        """Return a member of type ``kind``, or None if it is absent or null."""
        if not isinstance(self.value, dict):
            raise self.wrong(shown(self.value), "an object")
        value = self.value.get(name)
        if value is not None and type(value) is not kind:
            raise self.wrong(f"{name} {shown(value)}", f"a value of type {kind.__name__}")
        return value

    def ids(self, hint: str = _HINT) -> tuple[int, ...]:
        """Return a list of token ids; the error ends with ``hint``."""
        if not isinstance(self.value, list) or not all(map(is_id, self.value)):
            raise self.wrong(shown(self.value), "a list of token ids", hint)
        return tuple(self.value)

    def logprobs(self) -> tuple[float, ...]:
        """Return a list of log-probabilities (nats)."""
        if not isinstance(self.value, list):
            raise self.wrong(shown(self.value), "a list of log-probabilities")
        return tuple(self.logprob(value) for value in self.value)

    def logprob(self, value: Any) -> float:
        """Return ``value`` as a log-probability (nats)."""
        is_number = type(value) in (int, float)
        if not (is_number and _LEAST_LOGPROB < value <= ABOVE_ZERO):  # false for NaN
            raise self.wrong(
                shown(value),
                "a log-probability (finite, at most 0)",
                "start it with --logprobs-mode raw_logprobs or processed_logprobs",
            )
        return float(value)
