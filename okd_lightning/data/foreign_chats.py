"""Conversion of other chat formats to messages with ``role`` and ``content``.

ShareGPT's ``from`` and ``value`` (FastChat, Axolotl, LLaMA-Factory), content as a list of parts
(OpenAI, vLLM), chats as JSON text (cells of CSV), lists of ``input`` and ``output`` (Capybara), and
columns of a ``datasets.Sequence``. Other keys of a message (``weight``, ``tool_calls``, ``name``)
are not changed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from okd_lightning.bounded_files import parse_json
from okd_lightning.errors import DataError
from okd_lightning.records.images import MARKER

_ROLES = {
    **{role: role for role in ("system", "user", "assistant", "tool", "developer")},
    "human": "user",
    "ai": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "prompter": "user",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
_CALLS = ("function_call", "tool_call")
_KEYS = {"from": "role", "value": "content"}
_TEXT_OF_A_CHAT = re.compile(r"\s*\[\s*\{")
_PYTHON_TEXT = re.compile(r"\s*\[\s*\{\s*'(role|from|content|value)'\s*:")

IMAGE_PARTS = ("image", "image_url", "input_image")
"""Types of a message's part that is an image."""


def is_chat(cell: object) -> bool:
    """Return whether a cell holds messages: as a list, as its JSON text, or as columns."""
    if isinstance(cell, str) and not _TEXT_OF_A_CHAT.match(cell):
        return False
    found = listed_messages(cell)
    if not isinstance(found, list) or not found:
        return False
    return isinstance(found[0], Mapping) and bool({"role", "from"} & set(found[0]))


def is_python_text(cell: object) -> bool:
    """Return whether a cell is messages as Python prints them (pandas' ``to_csv`` of lists)."""
    return isinstance(cell, str) and bool(_PYTHON_TEXT.match(cell))


def listed_messages(cell: object) -> object:
    """Return the list of messages in a cell; the cell itself if it holds none."""
    if isinstance(cell, str):
        try:
            parsed = json.loads(cell)
        except (ValueError, RecursionError):
            return cell
        return parsed if isinstance(parsed, list) else cell
    if isinstance(cell, list) and cell and all(_is_exchange(item) for item in cell):
        return [
            {"role": role, "content": exchange[key]}
            for exchange in cell
            for key, role in (("input", "user"), ("output", "assistant"))
        ]
    if isinstance(cell, Mapping) and cell and all(isinstance(v, list) for v in cell.values()):
        lengths = {len(values) for values in cell.values()}
        if len(lengths) == 1:  # datasets.Sequence stores a list of structs as a struct of lists
            return [
                dict(zip(cell, values, strict=True)) for values in zip(*cell.values(), strict=True)
            ]
    return list(cell) if isinstance(cell, tuple) else cell


def _is_exchange(item: object) -> bool:
    """Return whether an item is a question with its answer, as in LDJnr/Capybara."""
    return isinstance(item, Mapping) and set(item) == {"input", "output"}


def with_known_keys(message: Mapping[str, Any], at: str) -> dict[str, Any]:
    """Rename a message's keys to ``role`` and ``content``, and its role to a known one.

    Args:
        message: A message without nulls.
        at: File, row and message, for the error.

    Raises:
        DataError: A tool call that is not valid JSON text of a call.
    """
    renamed = {key: name for key, name in _KEYS.items() if name not in message}
    found = {renamed.get(key, key): value for key, value in message.items()}
    if found.get("role") in _CALLS:
        calls = _read_calls(found.pop("content", None), at)
        return {**found, "role": "assistant", "content": "", "tool_calls": calls}
    if "role" in found:
        found["role"] = role_of(found)
    return found


def role_of(message: Mapping[str, Any]) -> Any:
    """Return the role of a message in any of the formats; known roles in any case."""
    role = message.get("role", message.get("from"))
    return _ROLES.get(role.strip().lower(), role) if isinstance(role, str) else role


def _read_calls(value: Any, at: str) -> list[dict[str, Any]]:
    what = f"{at}: the call of a tool"
    calls = parse_json(value, DataError, what) if isinstance(value, str) else value
    calls = [calls] if isinstance(calls, Mapping) else calls
    if not isinstance(calls, list) or not all(
        isinstance(c, Mapping) and "name" in c for c in calls
    ):
        raise DataError(
            f"{at}: the call of a tool is {type(value).__name__}, expected "
            '{"name": "...", "arguments": {...}} or a list of such'
        )
    return [{"type": "function", "function": dict(call)} for call in calls]


def text_of_parts(content: Sequence[Any], at: str, no_images: str | None) -> str:
    """Return the text of a content that is a list of parts, ``{"type": "text", "text": "..."}``.

    Args:
        content: The parts.
        at: File, row and message, for the error.
        no_images: Why images are not read; None where they are: each becomes ``<image>``.

    Raises:
        DataError: A part of another type, or an image that is not read.
    """
    texts = []
    for part in content:
        if isinstance(part, Mapping) and part.get("type") in IMAGE_PARTS:
            if no_images is not None:
                raise DataError(f"{at} has an image ({part['type']!r}), and {no_images}")
            texts.append(MARKER)
            continue
        text = part.get("text") if isinstance(part, Mapping) else part
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
        if kind not in ("text", "input_text", "output_text") or not isinstance(text, str):
            raise DataError(
                f'{at} has a list with a part of type {kind!r} as "content", expected text or '
                'parts {"type": "text", "text": "..."}'
            )
        texts.append(text)
    return "".join(texts)
