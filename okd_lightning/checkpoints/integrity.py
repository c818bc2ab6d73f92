"""Checksums of files that torch.save wrote: compared once, when a checkpoint is loaded.

``torch.save`` writes a zip whose records carry a CRC-32, and ``torch.load`` does not compare them:
a flipped bit of a weight would be loaded as another number.
"""

from __future__ import annotations

import functools
import struct
import zipfile
import zlib
from pathlib import Path
from typing import IO

_UNREADABLE = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError)


def damage_of(file: Path) -> str | None:
    """Return the damage of a file that ``torch.save`` wrote; None for a sound file.

    A file is read once, as long as it does not change. A file that is not a zip is left to
    ``torch.load``, which reports it.

    Args:
        file: A file on a local file system.
    """
    about = file.stat()
    return _damage_of(str(file), about.st_ino, about.st_size, about.st_mtime_ns)


def damage_in(stream: IO[bytes]) -> str | None:
    """Return the damage of an open file, or of a part of one; read from the current position."""
    try:
        with zipfile.ZipFile(stream) as archive:
            record = archive.testzip()
    except _UNREADABLE as error:
        return f"it cannot be unpacked: {error}"
    return None if record is None else f"record {record} does not match its checksum"


@functools.lru_cache(maxsize=256)
def _damage_of(path: str, inode: int, size: int, changed: int) -> str | None:
    # the arguments are the cache's key: a changed file is read again
    del inode, size, changed
    with open(path, "rb") as stream:
        return damage_in(stream) if zipfile.is_zipfile(stream) else None
