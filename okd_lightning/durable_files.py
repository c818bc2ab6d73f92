"""Files that are there whole or not at all, whatever ends the process or the machine.

A file is written aside in its own folder, flushed to the disk, and renamed over the one before; the
folder's entry is flushed as well. (fsspec's transactions, which Lightning saves with, write into
the system's temporary folder: on another file system the last move is a copy, which can be cut.)
"""

from __future__ import annotations

import glob
import io
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from okd_lightning.errors import OutputError

_ASIDE = ".new"


class _Watched(io.FileIO):
    """A file that remembers what the system said: torch hides it behind an error of its own."""

    problem: OSError | None = None

    def write(self, data: object) -> int:
        """All of ``data``, or an error that is remembered.

        Raises:
            OSError: The system's.
        """
        view = memoryview(data).cast("B")  # type: ignore[arg-type]
        try:
            written = 0
            while written < len(view):
                written += super().write(view[written:]) or 0
        except OSError as error:
            self.problem = error
            raise
        return written


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:  # some network file systems know no such thing
        pass
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path, aside: Path | None = None) -> Iterator[io.FileIO]:
    """A file that takes the place of ``path`` when the block has ended without an error.

    Args:
        path: Its folder must exist.
        aside: Where it is written first, in the same folder. By default one name for all processes,
            so that what a killed one has left is written over; give another where several may write
            at the same time.

    Raises:
        OutputError: It cannot be written, such as on a full disk. What was there before is
            untouched, and nothing is left aside.
    """
    aside = aside or path.with_name(f".{path.name}{_ASIDE}")
    file: _Watched | None = None
    try:
        with _Watched(aside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        sync_folder(path.parent)
    except BaseException as error:
        aside.unlink(missing_ok=True)
        problem = error if isinstance(error, OSError) else file.problem if file else None
        if problem is None or isinstance(error, OutputError):
            raise
        raise OutputError(
            f"{path} cannot be written ({problem.strerror}); what it held before is untouched. "
            "Make room, or choose another folder"
        ) from problem


def own_aside(path: Path) -> Path:
    """A place to write ``path`` aside that no other process takes.

    What processes of this machine have left there when they were killed is removed.
    """
    stem = f".{path.name}.{socket.gethostname()}."
    for left in path.parent.glob(f"{glob.escape(stem)}*{_ASIDE}"):
        number = left.name[len(stem) : -len(_ASIDE)]
        if number.isdecimal() and not _is_running(int(number)):
            left.unlink(missing_ok=True)
    return path.with_name(f"{stem}{os.getpid()}{_ASIDE}")


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        pass
    return True


def write_whole(path: Path, content: str | bytes, aside: Path | None = None) -> None:
    """Put ``content`` in the place of ``path``; see ``replacing``.

    Raises:
        OutputError: See ``replacing``.
    """
    with replacing(path, aside) as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)


def write_json(path: Path, content: Any, aside: Path | None = None) -> None:
    """A JSON file in the place of ``path``; see ``replacing``.

    Raises:
        OutputError: See ``replacing``.
    """
    write_whole(path, json.dumps(content, indent=1), aside)


def read_json(path: Path) -> Any:
    """What ``write_json`` wrote.

    Raises:
        ValueError: It is not JSON any more.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def require_writable(folder: Path, option: str) -> None:
    """Make ``folder`` and try to write in it.

    Raises:
        OutputError: It cannot be made or written.
    """
    probe = folder / ".write-test"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink(missing_ok=True)  # another process may have been here
    except OSError as error:
        raise OutputError(
            f"{option} {str(folder)!r} cannot be written ({error.strerror}); choose another folder"
        ) from error


def sync_file(path: Path) -> None:
    """Flush what was appended to a file to the disk; nothing where there is no such file."""
    if path.is_file():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes were writing aside in ``folder``."""
    for path in folder.glob(f".*{_ASIDE}"):
        path.unlink(missing_ok=True)
