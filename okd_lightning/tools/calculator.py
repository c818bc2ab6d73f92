"""Arithmetic as a tool; an expression is parsed and its tree evaluated, never executed."""

from __future__ import annotations

import ast
import math
import operator
import warnings
from collections.abc import Callable
from typing import TypeAlias

from okd_lightning.tools.base import Tool

_Number: TypeAlias = int | float

_LONGEST_EXPRESSION = 200  # characters
_MOST_BITS = 4096  # of an integer

_BINARY: dict[type[ast.operator], Callable[[_Number, _Number], _Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_UNARY: dict[type[ast.unaryop], Callable[[_Number], _Number]] = {
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}


class Calculator(Tool):
    """Evaluator of an arithmetic expression: numbers, parentheses, + - * / // % and **."""

    name = "calculator"
    description = "Evaluates an arithmetic expression and returns its value."
    parameters = {
        "type": "object",
        "properties": {
            "expression": {
                "type": "string",
                "description": "Numbers, parentheses and + - * / // % **, such as (3 + 4) * 2.5",
            }
        },
        "required": ["expression"],
    }

    def __call__(self, expression: str) -> str:
        """Return the value with up to 12 significant digits; integers in full.

        Raises:
            ValueError: The expression is not arithmetic, or is too long or too large.
            ArithmeticError: It has no value, such as a division by zero.
        """
        if len(expression) > _LONGEST_EXPRESSION:
            raise ValueError(f"the expression is longer than {_LONGEST_EXPRESSION} characters")
        try:
            with warnings.catch_warnings(action="ignore"):  # about odd literals
                tree = ast.parse(expression.strip(), mode="eval")
        except SyntaxError as error:
            raise ValueError(f"{expression!r} is not an arithmetic expression") from error
        value = _value(tree.body)
        return str(value) if isinstance(value, int) else f"{value:.12g}"


def _value(node: ast.expr) -> _Number:
    value: object = None
    if isinstance(node, ast.Constant):
        value = node.value
    elif isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
        value = _UNARY[type(node.op)](_value(node.operand))
    elif isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Pow):
            _check_power(left, right)
        value = _BINARY[type(node.op)](left, right)
    return _checked(value)


def _checked(value: object) -> _Number:
    """Return ``value`` if it is a real number of a limited size; raise otherwise."""
    if isinstance(value, complex):
        raise ArithmeticError("the value is not a real number")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError("only numbers, parentheses and + - * / // % ** can be evaluated")
    if math.isinf(value) if isinstance(value, float) else value.bit_length() > _MOST_BITS:
        raise OverflowError("the value is too large")
    return value


def _check_power(base: _Number, exponent: _Number) -> None:
    """Refuse a power that would take long to compute before it turns out to be too large."""
    if not (isinstance(base, int) and isinstance(exponent, int)):
        return
    if exponent * (base.bit_length() - 1) > _MOST_BITS:
        raise OverflowError("the value is too large")
