"""Several tools by name. An error in a call is its result, which the model reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from okd_lightning.errors import ConfigError
from okd_lightning.tools.base import FunctionTool, Tool
from okd_lightning.tools.tool_calls import ToolCall

_KINDS: dict[str, type | tuple[type, ...]] = {
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "array": list,
    "object": dict,
}


@dataclass(frozen=True)
class ToolResult:
    """Result of a call.

    Attributes:
        text: Text that the model reads.
        is_error: Whether the call failed.
    """

    text: str
    is_error: bool = False


class Toolbox:
    """The tools of a run.

    Args:
        tools: Tools with different names; plain functions become ``FunctionTool``s.

    Raises:
        ConfigError: Two tools of one name, or something that is not a tool.
    """

    def __init__(self, tools: Iterable[Tool] = ()) -> None:
        found = [tool if isinstance(tool, Tool) else FunctionTool(tool) for tool in tools]
        names = Counter(tool.name for tool in found)
        for name, count in names.items():
            if count > 1:
                raise ConfigError(
                    f"data.tools has {count} tools called {name!r}; rename or drop one"
                )
        self._tools = {tool.name: tool for tool in found}

    def __len__(self) -> int:
        return len(self._tools)

    @property
    def schemas(self) -> tuple[dict[str, Any], ...]:
        """Entries for chat templates."""
        return tuple(tool.schema for tool in self._tools.values())

    def run(self, call: ToolCall) -> ToolResult:
        """Run one call; an unknown tool, bad arguments and a tool's exceptions are its result."""
        tool = self._tools.get(call.name)
        if tool is None:
            return _failed(
                f"there is no tool {call.name[:60]!r}; there are {', '.join(self._tools)}"
            )
        if call.arguments is None:
            return _failed("the arguments are not a JSON object")
        problem = _problem(tool, dict(call.arguments))
        if problem:
            return _failed(problem)
        try:
            result = tool(**call.arguments)
        except Exception as error:  # noqa: BLE001  (the model reads any error)
            return _failed(f"{type(error).__name__}: {error}")
        return ToolResult(str(result))


def _failed(problem: str) -> ToolResult:
    return ToolResult(f"error: {problem}", is_error=True)


def _problem(tool: Tool, arguments: dict[str, Any]) -> str:
    """Return the error in a call's arguments, by the tool's schema; empty if there is none."""
    properties = tool.parameters.get("properties", {})
    for name in tool.parameters.get("required", ()):
        if name not in arguments:
            return f"{tool.name} needs the argument {name!r}"
    for name, value in arguments.items():
        if name not in properties:
            known = ", ".join(properties) or "no arguments"
            return f"{tool.name} has no argument {name!r}; it takes {known}"
        kind = properties[name].get("type")
        is_null = value is None and properties[name].get("nullable")
        if isinstance(kind, str) and not is_null and not _is_of(value, kind):
            return f"the argument {name!r} must be of type {kind}"
    return ""


def _is_of(value: object, kind: str) -> bool:
    if isinstance(value, bool) and kind != "boolean":
        return False
    return kind not in _KINDS or isinstance(value, _KINDS[kind])
