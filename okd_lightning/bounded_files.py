"""Untrusted files and texts, read within limits: regular files of limited size and nesting.

A path that a user types may be a pipe without a writer or an endless device; JSON may hold numbers
and nesting that Python refuses with its own errors; YAML aliases can expand ten lines to a billion
values. Each becomes an error of the class that the caller names.
"""

from __future__ import annotations

import json
import stat
import zlib
from pathlib import Path
from typing import Any

import yaml

from okd_lightning.errors import OKDLightningError, one_line

Refusal = type[OKDLightningError]

_LARGEST = 64 << 20
"""Bytes of a settings file; tokenizers of 250,000 ids take 35 MB."""

_MOST_NODES = 100_000
"""Values that a YAML text may expand to, with its aliases followed."""

_DEEPEST = 100
_MOST_BITS = 14_284  # of 4300 digits
_MOST_TIMES, _UNCHECKED = 250, 1 << 30
"""A gzip file may grow by this factor beyond the first GiB; texts grow by 3 to 30."""

_PIECE = 1 << 20


def require_regular(path: Path, error: Refusal, what: str) -> None:
    """Refuse a pipe, a device or a folder where a file is expected.

    Args:
        path: May be missing; opening it raises then.
        error: Class of the error.
        what: For the message, such as "--config 'run.yaml'".

    Raises:
        OKDLightningError: Of class ``error``.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):  # absent, or a name that no file can have
        return
    if stat.S_ISREG(mode):
        return
    kinds = {stat.S_ISDIR: "a folder", stat.S_ISFIFO: "a pipe", stat.S_ISSOCK: "a socket"}
    found = next((name for test, name in kinds.items() if test(mode)), "a device")
    raise error(f"{what}: {found} where a file is expected; write its content into a file first")


def read_limited(path: Path, error: Refusal, what: str, largest: int = _LARGEST) -> bytes:
    """Return the content of a regular file of limited size.

    Raises:
        OKDLightningError: Of class ``error``, also where the file cannot be opened.
    """
    require_regular(path, error, what)
    try:
        with path.open("rb") as file:
            content = file.read(largest + 1)
    except (OSError, ValueError) as problem:
        reason = getattr(problem, "strerror", None) or problem
        raise error(f"{what}: cannot be read ({reason})") from problem
    if len(content) > largest:
        raise error(f"{what}: more than {largest >> 20} MiB, which no such file has")
    return content


def read_text(path: Path, error: Refusal, what: str) -> str:
    """Return the UTF-8 text of a regular file of limited size; see ``read_limited``."""
    try:
        return read_limited(path, error, what).decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise error(f"{what}: not UTF-8 text ({problem.reason})") from problem


def parse_json(text: str | bytes, error: Refusal, what: str) -> Any:
    """Return the value of a JSON text.

    Raises:
        OKDLightningError: Of class ``error``: not JSON, nested too deeply, or with a number that
            Python does not read (more than 4300 digits).
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as problem:
        raise error(
            f"{what}: not valid JSON ({problem.msg} at line {problem.lineno}, character "
            f"{problem.colno})"
        ) from problem
    except (ValueError, RecursionError) as problem:
        raise error(f"{what}: not valid JSON ({json_problem(problem)})") from problem


def json_problem(problem: ValueError | RecursionError) -> str:
    """Describe an error of ``json.loads`` that names no character."""
    if isinstance(problem, RecursionError):
        return "nested too deeply"
    if isinstance(problem, UnicodeDecodeError):
        return f"not UTF-8: {problem.reason}"
    return (
        "a number of more than 4300 digits" if "digits" in str(problem) else one_line(str(problem))
    )


def read_json(path: Path, error: Refusal, what: str) -> Any:
    """Return the value of a JSON file; see ``read_text`` and ``parse_json``."""
    return parse_json(read_text(path, error, what), error, what)


def read_json_object(path: Path, error: Refusal, what: str) -> dict[str, Any]:
    """Return the object of a JSON file; see ``read_json``.

    Raises:
        OKDLightningError: Of class ``error``, also where the file holds something else.
    """
    found = read_json(path, error, what)
    if not isinstance(found, dict):
        raise error(f"{what}: a {type(found).__name__} where a JSON object is expected")
    return found


class BoundedYAMLLoader(yaml.SafeLoader):
    """PyYAML's safe loader, for texts that expand to a limited number of values and give each once.

    Every error is a ``yaml.YAMLError``, including nesting and numbers that Python refuses.
    """

    def get_single_node(self) -> yaml.Node | None:
        """Return the text's tree; refuse one that its aliases make too large, or a key twice."""
        try:
            node: yaml.Node | None = super().get_single_node()
            if node is not None:
                _count(node, {}, 0)
        except RecursionError as problem:
            raise yaml.YAMLError("nested too deeply") from problem
        return node

    def construct_document(self, node: yaml.Node) -> Any:
        """Return the value of the tree."""
        try:
            return super().construct_document(node)
        except (ValueError, TypeError, OverflowError, RecursionError) as problem:
            if isinstance(problem, yaml.YAMLError):
                raise
            raise yaml.YAMLError(one_line(str(problem), 200)) from problem

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """Return an integer; refuse one that Python cannot write as digits."""
        found = int(super().construct_yaml_int(node))
        if found.bit_length() > _MOST_BITS:
            raise yaml.YAMLError("a number of more than 4300 digits")
        return found


BoundedYAMLLoader.add_constructor("tag:yaml.org,2002:int", BoundedYAMLLoader.construct_yaml_int)


def load_yaml(text: str) -> Any:
    """Return the value of a YAML text.

    Raises:
        yaml.YAMLError: It is broken, or expands to more than 100,000 values.
    """
    return yaml.load(text, BoundedYAMLLoader)


def check_yaml(text: str) -> None:
    """Refuse a YAML text that expands to too many values, before another loader reads it.

    Raises:
        yaml.YAMLError: It is broken, or expands to more than 100,000 values.
    """
    if "*" in text or len(text) > _DEEPEST:  # an alias, or long enough for deep nesting
        yaml.compose(text, BoundedYAMLLoader)


def _count(node: yaml.Node, known: dict[int, int], depth: int) -> int:
    """Count the values of a tree, each alias with the values of its anchor."""
    if depth > _DEEPEST:
        raise yaml.YAMLError("nested too deeply, or an alias within its own value")
    if id(node) not in known:
        parts: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            parts = [part for pair in node.value for part in pair]
            _check_keys([key for key, _ in node.value if isinstance(key, yaml.ScalarNode)])
        elif isinstance(node, yaml.SequenceNode):
            parts = node.value
        known[id(node)] = 1 + sum(_count(part, known, depth + 1) for part in parts)
    if known[id(node)] > _MOST_NODES:
        raise yaml.YAMLError(f"aliases that expand to more than {_MOST_NODES:,} values")
    return known[id(node)]


def _check_keys(keys: list[yaml.ScalarNode]) -> None:
    """Refuse a key that a mapping has twice; PyYAML would silently keep the last value."""
    known: set[str] = set()
    for key in keys:
        if key.value in known and key.value != "<<":
            problem = f"{one_line(key.value, 100)!r} a second time; join both"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
        known.add(key.value)


def most_bytes(stored: int) -> int:
    """Return how many bytes a compressed file of ``stored`` bytes may expand to."""
    return max(_UNCHECKED, _MOST_TIMES * stored)


def decompressed(content: bytes) -> bytes:
    """Return the content of a gzip file, with all of its members.

    Raises:
        zlib.error, EOFError: The file is not a complete gzip file.
        OverflowError: The content grows more than texts do: a few KB that expand to many GB.
    """
    pieces: list[bytes] = []
    size, rest = 0, content
    most = most_bytes(len(content))
    while rest:
        reader = zlib.decompressobj(wbits=31)
        while not reader.eof:
            piece = reader.decompress(rest, _PIECE)
            rest = reader.unconsumed_tail
            if not piece and not rest and not reader.eof:
                raise EOFError("it ends before its end marker")
            pieces.append(piece)
            size += len(piece)
            if size > most:
                raise OverflowError(f"{len(content):,} bytes that expand to more than {size:,}")
        rest = reader.unused_data.lstrip(b"\0")
    return b"".join(pieces)
