"""Tools by themselves.

Frozen here: the calculator evaluates arithmetic and nothing else, in bounded time; a plain function
becomes a tool by its annotations and docstring; a toolbox turns every mistake into a result.
"""

from __future__ import annotations

import time

import pytest
import tool_chats

from okd_lightning.errors import ConfigError
from okd_lightning.tools import Calculator, FunctionTool, Tool, Toolbox
from okd_lightning.tools.tool_calls import ToolCall

VALUES = {
    "1+1": "2",
    " (3 + 4) * 2.5 ": "17.5",
    "6/2": "3",
    "1/3": "0.333333333333",
    "0.1+0.2": "0.3",
    "7//2": "3",
    "-7 % 3": "2",
    "2**10": "1024",
    "2**-2": "0.25",
    "2**-10000": "0",
    "+-+3": "-3",
    "10**20": "1" + "0" * 20,
    "1e300*10": "1e+301",
}

REFUSED = {
    "": "is not an arithmetic expression",
    "1 +": "is not an arithmetic expression",
    "1and 2": "is not an arithmetic|only numbers",
    "x + 1": "only numbers",
    "True + 1": "only numbers",
    "'a' * 3": "only numbers",
    "__import__('os').getcwd()": "only numbers",
    "(1).real": "only numbers",
    "[1, 2]": "only numbers",
    "1 < 2": "only numbers",
    "1 if 2 else 3": "only numbers",
    "1j": "not a real number",
    "(-8)**0.5": "not a real number",
    "1/0": "division by zero",
    "1 % 0": "modulo|division",
    "9**9**9**9": "too large",
    "1e999": "too large",
    "10.0**400": "too large|out of range",
    "(" * 150 + "1": "is not an arithmetic expression",
    "1+" * 150 + "1": "longer than 200",
    "\0": "null bytes|not an arithmetic",
}


@pytest.mark.parametrize("expression", VALUES)
def test_the_calculator_calculates(expression):
    assert Calculator()(expression) == VALUES[expression]


@pytest.mark.parametrize("expression", REFUSED)
def test_the_calculator_refuses(expression):
    start = time.perf_counter()
    with pytest.raises((ValueError, ArithmeticError), match=REFUSED[expression]):
        Calculator()(expression)
    assert time.perf_counter() - start < 1


def weather(city: str, days: int = 1, unit: str | None = None) -> str:
    """The weather of a city.

    Args:
        city: Its name.
        days: How many days from now.
        unit: Of temperatures.
    """
    return f"{city} in {days}: sunny, {unit}"


def test_a_function_is_a_tool():
    tool = FunctionTool(weather)
    assert (tool.name, tool.description) == ("weather", "The weather of a city.")
    assert tool.parameters["required"] == ["city"]
    assert tool.schema["function"]["parameters"]["properties"]["days"]["type"] == "integer"
    box = Toolbox([weather, Calculator()])
    result = box.run(ToolCall("weather", {"city": "Rome", "days": 2, "unit": None}))
    assert (result.text, result.is_error) == ("Rome in 2: sunny, None", False)
    assert [schema["function"]["name"] for schema in box.schemas] == ["weather", "calculator"]
    assert box.run(ToolCall("weather", {"city": "Rome", "days": True})).is_error
    assert box.run(ToolCall("weather", {"city": None})).is_error


def test_what_is_no_tool_is_refused():
    with pytest.raises(ConfigError, match=r"'os\.system'; expected a Tool, such as Calculator"):
        Toolbox(["os.system"])
    with pytest.raises(ConfigError, match=r"Calculator.*expected a Tool"):
        Toolbox([Calculator])
    with pytest.raises(ConfigError, match=r"'<lambda>' cannot be a tool: .*docstring"):
        Toolbox([lambda x: x])
    with pytest.raises(ConfigError, match="2 tools called 'calculator'"):
        Toolbox([Calculator(), Calculator()])
    with pytest.raises(TypeError, match="abstract"):
        Tool()


def test_a_result_that_is_no_text_is_turned_into_one():
    class Numbers(tool_chats.Echo):
        def __call__(self, text):
            return 3

    assert Toolbox([Numbers()]).run(ToolCall("echo", {"text": "a"})).text == "3"


def test_an_interrupt_is_not_a_tools_mistake():
    class Interrupted(tool_chats.Echo):
        def __call__(self, text):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Toolbox([Interrupted()]).run(ToolCall("echo", {"text": "a"}))
