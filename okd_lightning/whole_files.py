"""Files that are there as a whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any


def write_atomically(
    path: Path, write: Callable[[IO[bytes]], object], beside: Path | None = None
) -> None:
    """Write beside ``path`` and put it in place when it is on disk; kills leave no half file.

    Args:
        path: The file; its folder exists.
        write: Writes the content.
        beside: Where it is written first, in the same folder. By default one name for all
            processes, so that what a killed one has left is written over; give another where
            several may write at the same time.
    """
    beside = beside or path.with_name(f"{path.name}.tmp")
    with beside.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def write_json(path: Path, content: Any) -> None:
    """A JSON file, atomically."""
    text = json.dumps(content, indent=1).encode()
    write_atomically(path, lambda file: file.write(text))


def read_json(path: Path) -> Any:
    """What ``write_json`` wrote."""
    return json.loads(path.read_text(encoding="utf-8"))
