"""A server's JSON answer, read part by part: what is of another kind is a ServerError.

Knows no protocol; which parts an answer has is in ``vllm_client``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from okd_lightning.errors import ServerError, one_line

ABOVE_ZERO = 1e-3
"""Nats by which a log-probability may exceed 0, and a sum of probabilities 1: float16 rounding."""

_LEAST_LOGPROB = -1e30
_MOST_IDS = 2**31
_SHOWN = 200
_HINT = "is this an OpenAI-compatible vLLM server?"


def is_id(value: object) -> bool:
    """Whether ``value`` can be a token id: a whole number from 0 to 2^31 - 1."""
    return type(value) is int and 0 <= value < _MOST_IDS


def shown(value: object) -> str:
    """A value as it may stand in a message; what is long is cut before it is written."""
    if isinstance(value, dict):
        return "an object with " + (", ".join(repr(k)[:40] for k in list(value)[:5]) or "nothing")
    if isinstance(value, list):
        return f"a list of {len(value)}" + (f" from {shown(value[0])} on" if value else "")
    return repr(value[:_SHOWN]) if isinstance(value, str) else repr(value)[:_SHOWN]


@dataclass(frozen=True)
class AnswerPart:
    """A part of an answer; every method raises a ServerError where it is of another kind.

    Attributes:
        value: From JSON.
        at: Option, address and path within the answer, for messages.
    """

    value: Any
    at: str

    def wrong(self, got: str, expected: str, hint: str = _HINT) -> ServerError:
        """The error for this part."""
        return ServerError(
            f"{self.at} answers with {one_line(got, _SHOWN)} where {expected} is expected; {hint}"
        )

    def member(self, name: str) -> AnswerPart:
        """A member of an object, which must be there."""
        if not isinstance(self.value, dict) or name not in self.value:
            raise self.wrong(shown(self.value), f"an object with {name!r}")
        return AnswerPart(self.value[name], f"{self.at} ({name})")

    def items(self) -> list[AnswerPart]:
        """The items of a list."""
        if not isinstance(self.value, list):
            raise self.wrong(shown(self.value), "a list")
        return [AnswerPart(value, self.at) for value in self.value]

    def text(self) -> str:
        """A text."""
        if not isinstance(self.value, str):
            raise self.wrong(shown(self.value), "text")
        return self.value

    def optional(self, name: str, kind: type[Any]) -> Any:
        """A member of ``kind``, or None where it is absent or null."""
        if not isinstance(self.value, dict):
            raise self.wrong(shown(self.value), "an object")
        value = self.value.get(name)
        if value is not None and type(value) is not kind:
            raise self.wrong(f"{name} {shown(value)}", f"a value of type {kind.__name__}")
        return value

    def ids(self, hint: str = _HINT) -> tuple[int, ...]:
        """A list of token ids; the error ends with ``hint``."""
        if not isinstance(self.value, list) or not all(map(is_id, self.value)):
            raise self.wrong(shown(self.value), "a list of token ids", hint)
        return tuple(self.value)

    def logprobs(self) -> tuple[float, ...]:
        """A list of log-probabilities (nats)."""
        if not isinstance(self.value, list):
            raise self.wrong(shown(self.value), "a list of log-probabilities")
        return tuple(self.logprob(value) for value in self.value)

    def logprob(self, value: Any) -> float:
        """``value`` as a log-probability (nats)."""
        is_number = type(value) in (int, float)
        if not (is_number and _LEAST_LOGPROB < value <= ABOVE_ZERO):  # NaN is neither
            raise self.wrong(
                shown(value),
                "a log-probability (finite, at most 0)",
                "start it with --logprobs-mode raw_logprobs or processed_logprobs",
            )
        return float(value)
