"""Tools that a model may call in a rollout.

* ``base``: the Tool class, and plain Python functions as tools.
* ``calculator``: arithmetic, without evaluating code.
* ``tool_calls``: the calls in a response, in the forms that models generate.
* ``toolbox``: several tools by name; an error in a call becomes its result.
"""

from okd_lightning.tools.base import FunctionTool, Tool
from okd_lightning.tools.calculator import Calculator
from okd_lightning.tools.toolbox import Toolbox, ToolResult

__all__ = ["Calculator", "FunctionTool", "Tool", "ToolResult", "Toolbox"]
