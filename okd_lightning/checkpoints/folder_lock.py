"""One process at a time writes in a folder: a lock of the operating system.

It ends with the process that holds it, however that ends, so that nothing is left to be removed by
hand. Beside the lock's file lies the name of its holder: for messages, and as a mark of unfinished
work, since it stays where work that has begun ends with an error or its process is killed.
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

# newer releases put a marker file in the place of a lock that the file system does not know, and a
# marker outlives its process
_NATIVE: dict[str, Any] = (
    {"fallback_to_soft": False}
    if "fallback_to_soft" in inspect.signature(FileLock.__init__).parameters
    else {}
)


_HELD: set[Path] = set()
"""What this process holds; a fork of it inherits them, as ranks of one run do."""


@dataclass
class Hold:
    """What the holder of a folder says about its work.

    Attributes:
        has_begun: Whether something of it stays where it ends with an error.
    """

    has_begun: bool = False


@contextmanager
def folder_lock(folder: Path, what: str, waits: bool = False) -> Iterator[Hold]:
    """Hold ``folder`` for this process; the first process of a run does this for all of them.

    On a file system without locks a warning says that nothing keeps other runs away.

    Args:
        folder: It must exist, and be writable.
        what: The option and the folder, for messages, such as ``--out 'x'``.
        waits: Wait for another process in place of refusing.

    Raises:
        FolderInUseError: Another process holds it.
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
        (folder / LOCK_FILE).unlink(missing_ok=True)  # who waits for it notices, and tries again
        lock.release()
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def is_held_here(folder: Path) -> bool:
    """Whether this process holds ``folder``, or the one that has started it as a rank."""
    own = {"host": socket.gethostname(), "process": os.getppid()}
    return folder.resolve() in _HELD or _named_holder(folder) == own


def _put_back(path: Path, content: bytes | None) -> None:
    """Let the mark of unfinished work be what it was."""
    if content is None:
        path.unlink(missing_ok=True)
    else:
        path.write_bytes(content)


def _named_holder(folder: Path) -> Any:
    """What a holder has written about itself; None where there is nothing to be read."""
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
