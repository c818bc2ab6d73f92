"""The text of a data file: decompressed, decoded, and with one clear line where it cannot be.

Owns compression and encodings; ``json_files`` and ``csv_files`` know what the text means.
"""

from __future__ import annotations

import codecs
import zlib
from pathlib import Path

from okd_lightning.bounded_files import decompressed, require_regular
from okd_lightning.errors import DataError

_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_GZIP_MARK = b"\x1f\x8b"  # what a download is called says nothing about it


def kind_of_file(path: Path | str) -> str:
    """The suffix that says what a file holds, in lower case: ``.jsonl`` for ``rows.jsonl.gz``."""
    name = Path(path)
    suffix = name.suffix.lower()
    return Path(name.stem).suffix.lower() if suffix == ".gz" else suffix


def read_bytes(path: Path) -> bytes:
    """The content of a file, decompressed where it is gzip.

    Raises:
        DataError: It cannot be opened, or is no whole gzip file.
    """
    require_regular(path, DataError, str(path))
    try:
        content = path.read_bytes()
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({getattr(error, 'strerror', error)})") from error
    if not content.startswith(_GZIP_MARK) and path.suffix.lower() != ".gz":
        return content
    try:
        return decompressed(content)
    except (EOFError, zlib.error) as error:
        raise DataError(
            f"{path}: not a whole gzip file ({error}); download or compress it again"
        ) from error
    except OverflowError as error:
        raise DataError(f"{path}: {error}, which are not rows of text") from error


def read_text(path: Path) -> str:
    """The text of a file, without its byte order mark; line endings stay as they are.

    Raises:
        DataError: The file is not UTF-8, or cannot be read.
    """
    content = read_bytes(path)
    if content.startswith(_UTF16_MARKS):
        raise DataError(
            f"{path}: UTF-16 text, expected UTF-8; convert it: "
            f"iconv -f UTF-16 -t UTF-8 {path.name} > utf8_{path.name}"
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}, line {line}: not UTF-8 text (byte 0x{content[error.start]:02x}: "
            f"{error.reason}); convert it, e.g. from Windows-1252: "
            f"iconv -f WINDOWS-1252 -t UTF-8 {path.name} > utf8_{path.name}"
        ) from error
