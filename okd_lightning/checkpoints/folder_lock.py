"""Lock of a folder by the operating system, so that one process at a time writes in it.

The lock ends with its process in every case, so no stale lock has to be removed by hand. A second
file next to the lock names the holder. It is used in messages and marks unfinished work, since it
is kept where started work ends with an error or its process is killed.
"""

from __future__ import annotations

import inspect
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from okd_lightning.durable_files import read_json, write_json
from okd_lightning.errors import FolderInUseError

LOCK_FILE = ".lock"
HOLDER_FILE = ".holder.json"
LOCK_FILES = frozenset((LOCK_FILE, HOLDER_FILE))

# newer releases use a marker file where the file system has no locks, and a marker outlives its
# process
_NATIVE: dict[str, Any] = (
    {"fallback_to_soft": False}
    if "fallback_to_soft" in inspect.signature(FileLock.__init__).parameters
    else {}
)


_HELD: set[Path] = set()
"""Folders that this process holds; a fork inherits them, as the ranks of one run do."""


@dataclass
class Hold:
    """State of a locked folder's work.

    Attributes:
        has_begun: Whether a part of the work is kept if it ends with an error.
    """

    has_begun: bool = False


@contextmanager
def folder_lock(folder: Path, what: str, waits: bool = False) -> Iterator[Hold]:
    """Lock ``folder`` for this process; rank 0 does this for all ranks.

    On a file system without locks, warn that nothing prevents other runs from writing there.

    Args:
        folder: An existing, writable folder.
        what: The option and the folder, for messages, such as ``--out 'x'``.
        waits: Wait for another process instead of refusing.

    Raises:
        FolderInUseError: Another process holds the lock.
    """
    lock = FileLock(folder / LOCK_FILE, timeout=0, **_NATIVE)
    try:
        lock.acquire()
    except Timeout as error:
        if not waits:
            raise FolderInUseError(
                f"{what} is in use by {_holder(folder)}: wait until that has ended, stop it, or "
                "choose another folder"
            ) from error
        rank_zero_info(f"{what} is in use by {_holder(folder)}; waiting for its end")
        lock.acquire(timeout=-1)
    except (OSError, NotImplementedError) as error:
        rank_zero_warn(
            f"{what} cannot be locked ({error}): its file system has no locks, so that nothing "
            "keeps a second run from writing there"
        )
        yield Hold()
        return
    held = folder.resolve()
    _HELD.add(held)
    hold, path = Hold(), folder / HOLDER_FILE
    before = path.read_bytes() if path.is_file() else None
    try:
        own = {"host": socket.gethostname(), "process": os.getpid()}
        write_json(path, own)
        yield hold
        path.unlink(missing_ok=True)
    except BaseException:
        if not hold.has_begun:
            _put_back(path, before)
        raise
    finally:
        _HELD.discard(held)
        (folder / LOCK_FILE).unlink(missing_ok=True)  # waiting processes notice this, and try again
        lock.release()
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def is_held_here(folder: Path) -> bool:
    """Return whether this process holds ``folder``, or the one that has started it as a rank."""
    own = {"host": socket.gethostname(), "process": os.getppid()}
    return folder.resolve() in _HELD or _named_holder(folder) == own


def _put_back(path: Path, content: bytes | None) -> None:
    """Restore the mark of unfinished work."""
    if content is None:
        path.unlink(missing_ok=True)
    else:
        path.write_bytes(content)


def _named_holder(folder: Path) -> Any:
    """Return the holder's record of itself; None if it cannot be read."""
    try:
        return read_json(folder / HOLDER_FILE)
    except (OSError, ValueError):
        return None


def _holder(folder: Path) -> str:
    own = _named_holder(folder)
    try:
        return f"process {int(own['process'])} on host {own['host']!s}"
    except (ValueError, KeyError, TypeError):
        return "another process"
