"""Parser of tool calls in generated text, into names and arguments.

Recognised anywhere in a text: Qwen's and Hermes' ``<tool_call>{"name": ..., "arguments":
{...}}</tool_call>``, ReAct's ``Action: name`` with ``Action Input: {...}`` on a later line, and
JSON calls or lists of them, either as the whole text (Llama 3: "parameters") or on lines of their
own, where they have a name and arguments.

Parsing takes time linear in the text's length, even for a model that repeats itself: the possible
starts of calls are found one after the other, and only the first 64 are examined.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_MOST_STARTS = 64
_TAG, _END_TAG = "<tool_call>", "</tool_call>"
_ACTION, _INPUTS = "Action:", ("Action Input:", "Action_Input:")
_LONGEST_FIELD = 100
"""Most characters of a field name such as "Observation", which ends an action's input."""

_DECODER = json.JSONDecoder()
_ARGUMENTS = ("arguments", "parameters", "Action_Input")


_NOT_JSON = (ValueError, RecursionError)
"""Errors of reading a model's JSON, such as too deep nesting and too long numbers."""


@dataclass(frozen=True)
class ToolCall:
    """One call.

    Attributes:
        name: The tool's.
        arguments: By name; None where they are not a JSON object.
    """

    name: str
    arguments: Mapping[str, Any] | None


def parse_tool_calls(text: str) -> tuple[ToolCall, ...]:
    """Return the calls in a model's text, in order; empty without calls.

    A call whose JSON is broken has no arguments (None), and the name "" where that cannot be read.
    """
    tagged = list(_tagged(text))
    if tagged:
        return tuple(_from_json(body) or ToolCall("", None) for body in tagged)
    steps = list(_react_steps(text))
    if steps:
        return tuple(ToolCall(name, _object(body)) for name, body in steps)
    try:
        return _from_values(json.loads(text))
    except _NOT_JSON:
        return tuple(call for value in _json_lines(text) for call in _from_values(value))


@dataclass(frozen=True)
class CallShares:
    """Agreement of a text's calls with those of a reference, each from 0 to 1.

    Attributes:
        names: Share with the right name.
        arguments: Share with the right name and the right arguments.
        all_equal: 1 where the multiset of names and the multiset of (argument, value) pairs over
            all calls equal the reference's, else 0: the all-or-nothing measure of OPD+'s tool task
            (Zhao et al., arXiv 2606.01039), independent of order.
    """

    names: float
    arguments: float
    all_equal: float


def match_tool_calls(response: str, reference: str, ordered: bool = True) -> CallShares | None:
    """Compare the calls of two texts; an extra or missing call counts as wrong.

    Values are compared as the Berkeley function-calling leaderboard does: ``true`` is not ``1``,
    ``1`` is ``1.0``.

    Args:
        response: A model's text.
        reference: The text with the right calls.
        ordered: Compare calls in order; otherwise each call of the response with any call of the
            reference that is not matched yet.

    Returns:
        None where the reference has no calls.
    """
    wanted, given = parse_tool_calls(reference), parse_tool_calls(response)
    if not wanted:
        return None
    num_calls = max(len(wanted), len(given))
    if ordered:
        pairs = list(zip(given, wanted, strict=False))
        num_named = sum(call.name == want.name for call, want in pairs)
        num_right = sum(_call_key(call) == _call_key(want) for call, want in pairs)
    else:
        names = (Counter(call.name for call in calls) for calls in (given, wanted))
        num_named = (next(names) & next(names)).total()
        num_right = (Counter(map(_call_key, given)) & Counter(map(_call_key, wanted))).total()
    all_equal = float(_merged(given) == _merged(wanted))
    return CallShares(num_named / num_calls, num_right / num_calls, all_equal)


def _call_key(call: ToolCall) -> str:
    """Return a text that is the same for two calls with equal name and arguments."""
    return _canonical([call.name, call.arguments])


def _merged(calls: Sequence[ToolCall]) -> tuple[Counter[str], Counter[str]]:
    """Count the calls of each tool, and of each argument with each value."""
    pairs = Counter(
        _canonical([key, value])
        for call in calls
        for key, value in ({"": None} if call.arguments is None else call.arguments).items()
    )
    return Counter(call.name for call in calls), pairs


def _canonical(value: Any) -> str:
    """Return JSON with sorted keys; a float with an integer value is written as an integer."""
    try:
        return json.dumps(_whole_numbers(value), sort_keys=True)
    except RecursionError:  # readable, but too deep to compare: equal to nothing else
        return f"object {id(value)}"


def _whole_numbers(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, Mapping):
        return {str(key): _whole_numbers(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_whole_numbers(inner) for inner in value]
    return value


def _starts(text: str, mark: str) -> Iterator[int]:
    """Yield the end of a mark at its first 64 occurrences."""
    end = 0
    for _ in range(_MOST_STARTS):
        start = text.find(mark, end)
        if start < 0:
            return
        end = start + len(mark)
        yield end


def _tagged(text: str) -> Iterator[str]:
    """Yield the text between tags; a tag within another call's text is skipped."""
    done = 0
    for start in _starts(text, _TAG):
        if start < done:
            continue
        end = text.find(_END_TAG, start)
        if end < 0:
            return
        done = end + len(_END_TAG)
        yield text[start:end]


def _react_steps(text: str) -> Iterator[tuple[str, str]]:
    """Yield name and input of each ``Action:`` with an ``Action Input:`` on a later line."""
    done = 0
    for start in _starts(text, _ACTION):
        if start < done:
            continue
        line_end = text.find("\n", start)
        words = text[start:line_end].split() if line_end >= 0 else []
        follows = _after_space(text, line_end) if len(words) == 1 else len(text)
        if text[follows : follows + len(_INPUTS[0])] in _INPUTS:
            begin = follows + len(_INPUTS[0])
            done = _end_of_input(text, begin)
            yield words[0], text[begin:done].lstrip(" \t")


def _after_space(text: str, start: int) -> int:
    """Return the first position from ``start`` on without white space."""
    while start < len(text) and text[start].isspace():
        start += 1
    return start


def _end_of_input(text: str, begin: int) -> int:
    """Return the start of the next line that names a field, such as ``Observation:``."""
    end = text.find("\n", begin)
    while end >= 0:
        line = _after_space(text, end)
        field, colon, _ = text[line : line + _LONGEST_FIELD].partition(":")
        if colon and field[:1].strip() and field.replace("_", "a").replace(" ", "a").isalnum():
            return end
        end = text.find("\n", max(line, end + 1))
    return len(text)


def _line_starts(text: str) -> Iterator[int]:
    """Yield the starts of lines that begin with a JSON bracket, for the first 64 such lines."""
    num_found, end = 0, -1
    while num_found < _MOST_STARTS:
        line = end + 1
        end = text.find("\n", line)
        content = (text[line:end] if end >= 0 else text[line:]).lstrip(" \t")
        if content[:1] in ("{", "["):
            num_found += 1
            yield (end if end >= 0 else len(text)) - len(content)
        if end < 0:
            return


def _from_values(whole: Any) -> tuple[ToolCall, ...]:
    calls = [_from_value(value) for value in (whole if isinstance(whole, list) else [whole])]
    return tuple(call for call in calls if call is not None)


def _json_lines(text: str) -> Iterator[Any]:
    """Yield JSON objects and lists on lines of their own that have an "arguments" key."""
    done = 0
    for start in _line_starts(text):
        if start < done:
            continue
        try:
            value, done = _DECODER.raw_decode(text, start)
        except _NOT_JSON:
            continue
        line_end = text.find("\n", done)
        rest = text[done : len(text) if line_end < 0 else line_end].strip(" \t;")
        values = value if isinstance(value, list) else [value]
        if not rest and all(isinstance(v, Mapping) and v.keys() & {*_ARGUMENTS} for v in values):
            yield value


def _from_json(body: str) -> ToolCall | None:
    try:
        return _from_value(json.loads(body))
    except _NOT_JSON:
        return None


def _from_value(value: Any) -> ToolCall | None:
    """Read a call: {"name", "arguments"}, {"function": {...}} or ToolAlpaca's {"Action", ...}."""
    if not isinstance(value, Mapping):
        return None
    value = value.get("function", value)
    if not isinstance(value, Mapping):
        return None
    name = value.get("name", value.get("Action"))
    if not isinstance(name, str):
        return None
    for key in _ARGUMENTS:
        if key in value:
            return ToolCall(name, _object(value[key]))
    return ToolCall(name, {})


def _object(value: Any) -> Mapping[str, Any] | None:
    """Return a JSON object, also from its text; None for anything else."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except _NOT_JSON:
            return None
    return value if isinstance(value, Mapping) else None
