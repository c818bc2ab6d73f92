"""Calls of tools in a text: the forms that are understood, and when two calls are equal.

Frozen: ``true`` is not ``1`` and ``1`` is ``1.0`` (as in the Berkeley function-calling
leaderboard); parallel calls match in any order where that is asked for; the all-or-nothing measure
compares the multisets of names and of argument values; time is linear in a text's length.
"""

from __future__ import annotations

import json
import time

import pytest

from okd_lightning.tools.tool_calls import CallShares, ToolCall, match_tool_calls, parse_tool_calls

A = ToolCall("a", {"x": 1})
B = ToolCall("b", {})
JSON_A, JSON_B = '{"name": "a", "arguments": {"x": 1}}', '{"name": "b", "parameters": {}}'

TEXTS = {
    f"<tool_call>\n{JSON_A}\n</tool_call>": [A],
    f"So: <tool_call>{JSON_A}</tool_call><tool_call>{JSON_B}</tool_call> well": [A, B],
    "<tool_call>{]</tool_call>": [ToolCall("", None)],
    "<tool_call>unfinished": [],
    'Action: a\nAction Input: {"x": 1}': [A],
    JSON_A: [A],
    f"[{JSON_A}, {JSON_B}]": [A, B],
    '{"name": "b"}': [B],
    f"{JSON_A}\n{JSON_B}": [A, B],
    f"I look:\n{JSON_A}\nand then\n  {JSON_B};\n": [A, B],
    f"{JSON_A}\nThe answer is 3.": [A],
    f"[\n{JSON_A},\n{JSON_B}]\ndone": [A, B],
    f"as {JSON_A} in a sentence": [],
    f"{JSON_A} is what I call": [],
    'see\n{"name": "Ann"}': [],
    'see\n{"name": "Ann",\n"arguments": {}': [],
    "[1, 2]\nno": [],
    "[]\nno": [],
    "{\n{": [],
    "": [],
    "3": [],
    "[" * 100_000: [],
    f"<tool_call>{'[' * 100_000}</tool_call>": [ToolCall("", None)],
    f"well\n{'[' * 100_000}": [],
    f"Action: a\nAction Input: {{{'[' * 100_000}": [ToolCall("a", None)],
    "7" * 5000: [],
}


LOOPS = {
    "tags": "<tool_call>",
    "tags with text": '<tool_call>{"a": [',
    "actions": "Action: a\n",
    "actions far from an input": "Action: a\n\n\n\n",
    "inputs": "Action: a\nAction Input: ",
    "fields": "Action: a\nAction Input: x\n y z\n",
    "open objects": '{"a": [\n',
    "objects": '{"a": 1} x\n',
    "brackets": "[\n",
    "blanks": "  ",
}


@pytest.mark.parametrize("unit", LOOPS.values(), ids=LOOPS)
def test_a_text_that_repeats_itself_is_read_in_linear_time(unit):
    """A million characters in the processor time that the quadratic reading of 30,000 took."""
    start = time.process_time()
    parse_tool_calls(unit * (1_000_000 // len(unit)))
    assert time.process_time() - start < 3


def test_no_more_than_64_calls_are_read():
    assert len(parse_tool_calls(call("a") * 100)) == 64


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text[:20])
def test_calls_are_found(text):
    assert list(parse_tool_calls(text)) == TEXTS[text]


def call(name, **arguments):
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


@pytest.mark.parametrize(
    ("given", "wanted", "is_equal"),
    [
        (1, 1.0, True),
        (True, 1, False),
        (False, 0, False),
        ("1", 1, False),
        ([1, {"b": 2, "a": True}], [1.0, {"a": True, "b": 2}], True),
        ([1, 2], [2, 1], False),
        (None, None, True),
        ({"deep": {"flag": True}}, {"deep": {"flag": 1}}, False),
    ],
)
def test_values_are_compared_by_type(given, wanted, is_equal):
    shares = match_tool_calls(call("f", x=given), call("f", x=wanted))
    assert shares == CallShares(1.0, float(is_equal), float(is_equal))


def test_parallel_calls_match_in_any_order():
    one, two = call("f", x=1), call("g", y=2)
    assert match_tool_calls(two + one, one + two) == CallShares(0.0, 0.0, 1.0)
    assert match_tool_calls(two + one, one + two, ordered=False) == CallShares(1.0, 1.0, 1.0)
    assert match_tool_calls(one + one, one + two, ordered=False) == CallShares(0.5, 0.5, 0.0)
    assert match_tool_calls(one, one + two, ordered=False) == CallShares(0.5, 0.5, 0.0)


def test_all_equal_merges_the_inputs_of_all_calls():
    wanted = call("f", x=1) + call("f", y=2)
    assert match_tool_calls(call("f", x=1, y=2) + call("f"), wanted).all_equal == 1.0
    assert match_tool_calls(call("f", x=1, y=2), wanted).all_equal == 0.0  # one action too few
    assert match_tool_calls(call("f", x=1) + call("f", x=2), wanted).all_equal == 0.0


def test_arguments_too_deep_to_compare_are_wrong():
    deep = '{"name": "f", "arguments": {"x": ' + "[" * 600 + "]" * 600 + "}}"
    assert match_tool_calls(deep, call("f", x=1)) == CallShares(1.0, 0.0, 0.0)
