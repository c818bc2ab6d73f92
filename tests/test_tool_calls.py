"""Calls of tools in a text: the forms that are understood, wherever they stand."""

from __future__ import annotations

import pytest

from okd_lightning.tool_calls import ToolCall, parse_tool_calls

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


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text[:20])
def test_calls_are_found(text):
    assert list(parse_tool_calls(text)) == TEXTS[text]
