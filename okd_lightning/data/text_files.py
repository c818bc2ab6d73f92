"""The text of a data file: decompressed and decoded, with one-line errors.

Owns compression and encodings; ``json_files`` and ``csv_files`` interpret the text.
"""

from __future__ import annotations

import codecs
import zlib
from pathlib import Path

from okd_lightning.bounded_files import decompressed, require_regular
from okd_lightning.errors import DataError

_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_GZIP_MARK = b"\x1f\x8b"  # a downloaded file may lack the suffix .gz


def kind_of_file(path: Path | str) -> str:
    """Return the suffix of a file's format, in lower case: ``.jsonl`` for ``rows.jsonl.gz``."""
    name = Path(path)
    suffix = name.suffix.lower()
    return Path(name.stem).suffix.lower() if suffix == ".gz" else suffix


def read_bytes(path: Path) -> bytes:
    """Return the content of a file, decompressed if it is gzip.

    Raises:
        DataError: It cannot be opened, or is not a complete gzip file.
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
    """Return the text of a file, without its byte order mark, with its line endings.

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
