"""Tools: a name and a schema that the model reads, and a call."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from transformers.utils import get_json_schema
from transformers.utils.chat_template_utils import (
    DocstringParsingException,
    TypeHintParsingException,
)

from okd_lightning.errors import ConfigError


class Tool(ABC):
    """Abstract tool, which a model may call by name during a rollout.

    A complete one:

        class Clock(Tool):
            name = "clock"
            description = "The time of day in a time zone."
            parameters = {
                "type": "object",
                "properties": {"zone": {"type": "string", "description": "Such as Europe/Rome."}},
                "required": ["zone"],
            }

            def __call__(self, zone: str) -> str:
                return datetime.now(ZoneInfo(zone)).strftime("%H:%M")

    An exception in a call becomes the call's result, as an error text that the model reads. A tool
    that returns different results for the same call makes runs differ; a resumed run keeps the
    results that its checkpoint holds.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """Name by which the model calls the tool."""

    @property
    @abstractmethod
    def description(self) -> str:
        """Description of the tool, for the model."""

    @property
    @abstractmethod
    def parameters(self) -> Mapping[str, Any]:
        """JSON schema of the arguments: an object with properties."""

    @abstractmethod
    def __call__(self, *_: Any, **arguments: Any) -> str:
        """Return the result, as text that the model reads.

        Args:
            **arguments: Those of the call, by name; they agree with ``parameters``. A subclass
                names its own.
        """

    @property
    def schema(self) -> dict[str, Any]:
        """Entry for chat templates: name, description and parameters as a JSON schema."""
        function = {"name": self.name, "description": self.description}
        return {"type": "function", "function": {**function, "parameters": dict(self.parameters)}}


class FunctionTool(Tool):
    """A plain Python function with annotations and a Google-style docstring, as a tool.

    transformers' ``get_json_schema`` reads name, description and parameters from it. Functions can
    be given from Python only; a config names a ``Tool`` class of your own.

    Args:
        function: The function; its return value is the result, converted to text if needed.

    Raises:
        ConfigError: ``function`` is not a function, or lacks annotations or a docstring.
    """

    def __init__(self, function: object) -> None:
        if not callable(function) or isinstance(function, type):
            raise ConfigError(
                f"a tool is {function!r}; expected a Tool, such as Calculator, or (in Python) a "
                "function with annotations and a docstring"
            )
        try:
            schema = get_json_schema(function)["function"]
        except (DocstringParsingException, TypeHintParsingException, OSError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"function {getattr(function, '__name__', function)!r} cannot be a tool: {reason}; "
                "give it annotations and a docstring with an Args: section"
            ) from error
        self._function = function
        self._schema = schema

    @property
    def name(self) -> str:
        """The function's name."""
        return str(self._schema["name"])

    @property
    def description(self) -> str:
        """The first part of the function's docstring."""
        return str(self._schema["description"])

    @property
    def parameters(self) -> Mapping[str, Any]:
        """JSON schema of the function's signature."""
        parameters: Mapping[str, Any] = self._schema["parameters"]
        return parameters

    def __call__(self, *_: Any, **arguments: Any) -> str:
        """Call the function."""
        return str(self._function(**arguments))
