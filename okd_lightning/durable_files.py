"""Atomic file writes: a file is complete or absent, even if process or machine stops.

A file is written aside in its own folder, flushed to the disk, and renamed over the old one; the
folder's entry is flushed as well. (fsspec's transactions, which Lightning uses for saving, write
into the system's temporary folder: on another file system the last move is a copy, which can be cut
off.)
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
    """A file that keeps the system's error: torch hides it in an error of its own."""

    problem: OSError | None = None

    def write(self, data: object) -> int:
        """Write all of ``data``; keep an error.

        Raises:
            OSError: The system's.
        """
        view = memoryview(data).cast("B")  # type: ignore[arg-type]
        # FileIO.write may write a part only
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
    except OSError:  # some network file systems do not support this
        pass
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path, aside: Path | None = None) -> Iterator[io.FileIO]:
    """Open a file that replaces ``path`` when the block has ended without an error.

    Args:
        path: Its folder must exist.
        aside: Path in the same folder that is written first. By default one name for all processes,
            so that a killed process's leftover is overwritten; give another where several may write
            at the same time.

    Raises:
        OutputError: The file cannot be written, such as on a full disk. The old file is untouched,
            and nothing is left aside.
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
    """Return a path to write ``path`` aside that no other process uses.

    Leftovers of killed processes of this machine are removed.
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
    except OSError:  # another user's process
        pass
    return True


def write_whole(path: Path, content: str | bytes, aside: Path | None = None) -> None:
    """Replace ``path`` by ``content``; see ``replacing``.

    Raises:
        OutputError: See ``replacing``.
    """
    with replacing(path, aside) as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)


def write_json(path: Path, content: Any, aside: Path | None = None) -> None:
    """Replace ``path`` by a JSON file; see ``replacing``.

    Raises:
        OutputError: See ``replacing``.
    """
    write_whole(path, json.dumps(content, indent=1), aside)


def read_json(path: Path) -> Any:
    """Read a file of ``write_json``.

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
    """Flush data that was appended to a file to the disk; a missing file is not an error."""
    if path.is_file():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def remove_leftovers(folder: Path) -> None:
    """Remove files that killed processes were writing aside in ``folder``."""
    for path in folder.glob(f".*{_ASIDE}"):
        path.unlink(missing_ok=True)
