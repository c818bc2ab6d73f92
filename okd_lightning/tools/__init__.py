"""Tools that a model may call while it writes a rollout.

* ``base``: what a tool is, and plain Python functions as tools.
* ``calculator``: arithmetic, without evaluating code.
* ``tool_calls``: the calls in a response, in the forms that models write.
* ``toolbox``: several tools by name; whatever goes wrong in a call becomes its result.
"""

from okd_lightning.tools.base import FunctionTool, Tool
from okd_lightning.tools.calculator import Calculator
from okd_lightning.tools.toolbox import Toolbox, ToolResult

__all__ = ["Calculator", "FunctionTool", "Tool", "ToolResult", "Toolbox"]
