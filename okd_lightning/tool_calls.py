"""Calls of tools as models write them: text in, name and arguments out. Knows no tool.

Understood, wherever they stand in a text: Qwen's and Hermes' ``<tool_call>{"name": ...,
"arguments": {...}}</tool_call>``, ReAct's ``Action: name`` with ``Action Input: {...}`` on a line
behind it, and a text that is a JSON call, or a list of them, as a whole (Llama 3: "parameters") or
on lines of its own among others, where it has a name and arguments.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_TAGGED = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
_REACT = re.compile(
    r"Action:[ \t]*(\S+)\s*\n\s*Action[ _]Input:[ \t]*(.*?)(?=\n\s*\w[\w ]*:|\Z)", re.DOTALL
)

_LINE_OF_JSON = re.compile(r"^[ \t]*[{\[]", re.MULTILINE)
_DECODER = json.JSONDecoder()
_ARGUMENTS = ("arguments", "parameters", "Action_Input")


_NOT_JSON = (ValueError, RecursionError)
"""What reading JSON that a model has written can raise: brackets without end, endless numbers."""


@dataclass(frozen=True)
class ToolCall:
    """One call.

    Attributes:
        name: The tool's.
        arguments: By name; None where they are no JSON object.
    """

    name: str
    arguments: Mapping[str, Any] | None


def parse_tool_calls(text: str) -> tuple[ToolCall, ...]:
    """The calls in a model's text, in order; none where it calls nothing.

    A call whose JSON is broken is one without arguments, named by what stands for its name.
    """
    tagged = _TAGGED.findall(text)
    if tagged:
        return tuple(_from_json(body) or ToolCall("", None) for body in tagged)
    steps = _REACT.findall(text)
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
            all calls are the reference's, else 0: the all-or-nothing measure of OPD+'s tool task
            (Zhao et al., arXiv 2606.01039), free of order.
    """

    names: float
    arguments: float
    all_equal: float


def match_tool_calls(response: str, reference: str, ordered: bool = True) -> CallShares | None:
    """Compare the calls of two texts; one too many or too few counts as wrong.

    Values are compared as the Berkeley function-calling leaderboard does: ``true`` is not ``1``,
    ``1`` is ``1.0``.

    Args:
        response: A model's text.
        reference: The text with the right calls.
        ordered: Compare the first call with the first one, and so on; otherwise each call of the
            response with any one of the reference that no other call has taken.

    Returns:
        None where the reference calls nothing.
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
    """A text that two calls share where name and arguments are equal."""
    return _canonical([call.name, call.arguments])


def _merged(calls: Sequence[ToolCall]) -> tuple[Counter[str], Counter[str]]:
    """How often each tool is called, and each argument given with each value."""
    pairs = Counter(
        _canonical([key, value])
        for call in calls
        for key, value in ({"": None} if call.arguments is None else call.arguments).items()
    )
    return Counter(call.name for call in calls), pairs


def _canonical(value: Any) -> str:
    """JSON with sorted keys; a float that is a whole number is written as one."""
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


def _from_values(whole: Any) -> tuple[ToolCall, ...]:
    calls = [_from_value(value) for value in (whole if isinstance(whole, list) else [whole])]
    return tuple(call for call in calls if call is not None)


def _json_lines(text: str) -> Iterator[Any]:
    """The JSON objects and lists that stand on lines of their own and say "arguments"."""
    done = 0
    for start in _LINE_OF_JSON.finditer(text):
        if start.end() - 1 < done:
            continue
        try:
            value, done = _DECODER.raw_decode(text, start.end() - 1)
        except _NOT_JSON:
            continue
        rest = text[done:].partition("\n")[0].strip(" \t;")
        values = value if isinstance(value, list) else [value]
        if not rest and all(isinstance(v, Mapping) and v.keys() & {*_ARGUMENTS} for v in values):
            yield value


def _from_json(body: str) -> ToolCall | None:
    try:
        return _from_value(json.loads(body))
    except _NOT_JSON:
        return None


def _from_value(value: Any) -> ToolCall | None:
    """A call from {"name", "arguments"}, {"function": {...}} or ToolAlpaca's {"Action", ...}."""
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
    """A JSON object, also where it is written as text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except _NOT_JSON:
            return None
    return value if isinstance(value, Mapping) else None
