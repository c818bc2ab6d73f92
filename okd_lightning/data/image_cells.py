"""Cells of rows that hold images: a column's, and the parts of messages.

Owns their forms: a path, a file in base64, an image of Pillow, and what is refused.
"""

from __future__ import annotations

import base64
import binascii
import io
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image, ImageOps

from okd_lightning.data.columns import NO_IMAGES, Columns, RawRow
from okd_lightning.data.foreign_chats import IMAGE_PARTS, listed_messages, role_of
from okd_lightning.errors import DataError, one_line
from okd_lightning.records.images import MARKER

_EXPECTED = (
    'expected {"type": "image", "path": "FILE"} or {"type": "image", "bytes": "BASE64"}, or a '
    "file name in the images column"
)
_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16", "I;16B", "I;16L", "I;16N")
_OTHER_NAMES = ("image", "image_path", "image_file", "image_paths", "img", "picture", "images")
_URL_KEYS = ("url", "image_url")


def places_of(row: RawRow, columns: Columns) -> list[Any]:
    """Return one entry for each place in a chat: the part's own image, or None for the column's.

    ``<image>`` in an assistant's text is not a place in the prompt.
    """
    found: list[Any] = []
    messages = listed_messages(row.get(columns.messages or ""))
    for message in messages if isinstance(messages, list) else []:
        if not isinstance(message, Mapping):
            continue
        content = message.get("content", message.get("value"))
        is_prompt = role_of(message) != "assistant"
        for part in content if isinstance(content, list) else [content]:
            if isinstance(part, Mapping) and part.get("type") in IMAGE_PARTS:
                own = {key: value for key, value in part.items() if value is not None}
                own.pop("type")
                found.append(own or None)
            elif is_prompt:
                text = part.get("text") if isinstance(part, Mapping) else part
                found += [None] * (text.count(MARKER) if isinstance(text, str) else 0)
    return found


def cells_of(row: RawRow, columns: Columns, at: str) -> list[Any]:
    """Return the cells of the images column: a list of images, or one.

    Raises:
        DataError: The cell is neither a list nor an image.
    """
    value = None if columns.images is None else row.get(columns.images)
    if value is None or (isinstance(value, str) and not value):
        return []
    if isinstance(value, list | tuple):
        return list(value)
    if isinstance(value, str | Mapping | Image.Image):
        return [value]
    raise DataError(
        f"{at}: the images ({columns.images!r}) are {type(value).__name__}, expected a list; "
        f"{_EXPECTED}"
    )


def has_images(rows: Sequence[RawRow], columns: Columns, where: str) -> bool:
    """Return whether a row's images column has an image, or a message has one as a part.

    Args:
        rows: The raw rows.
        columns: The columns that are read.
        where: The dataset's name for messages.
    """
    numbered = enumerate(rows, start=1)
    if any(cells_of(r, columns, f"{where}, row {n}") for n, r in numbered if columns.images in r):
        return True
    return any(place is not None for row in rows for place in places_of(row, columns))


def check_images_are_read(
    rows: Sequence[RawRow], columns: Columns, where: str, *, is_text: bool
) -> None:
    """Refuse rows whose images would be left out, so that ``<image>`` would be plain text.

    Args:
        rows: The raw rows, of which none has an image that is read.
        columns: The columns that are read.
        where: The dataset's name for messages.
        is_text: Whether the models read text alone.

    Raises:
        DataError: A row has ``<image>`` and a column of images; the message names both ways out.
    """
    if columns.images is None:
        return
    for number, row in enumerate(rows, start=1):
        names = [n for n in row if n.lower() in _OTHER_NAMES and _is_given(row[n])]
        if not names or MARKER not in str([row[n] for n in row if n not in names]):
            continue
        advice = (
            f"{NO_IMAGES}; or read the text alone with --data.images_column null"
            if is_text
            else f"use --data.images_column {shlex.quote(names[0])}, or null to read the text alone"
        )
        raise DataError(
            f"{where}, row {number}: the text has {MARKER}, and the images in the column "
            f"{names[0]!r} are not read: {advice}"
        )


def _is_given(cell: Any) -> bool:
    return isinstance(cell, str | list | tuple | Mapping | Image.Image) and bool(cell)


def source_of(cell: Any, name: str, at: str) -> tuple[str | None, bytes, str]:
    """Return an image's path, or its encoded file, and its name.

    Args:
        cell: A path, or a mapping with a path, bytes or a ``data:`` URL, or an image of Pillow.
        name: Its name where it has no path.
        at: File and row, for messages.

    Raises:
        DataError: A cell of another form, and a URL.
    """
    if isinstance(cell, Image.Image):
        return None, _encoded(cell, name, at), name
    if isinstance(cell, str):
        cell = {"path": cell}
    if not isinstance(cell, Mapping):
        raise DataError(f"{at}: {name} is given as {type(cell).__name__}; {_EXPECTED}")
    path, data = cell.get("path", cell.get("image")), cell.get("bytes")
    if isinstance(path, Image.Image):
        return source_of(path, name, at)
    if data is not None:
        return None, _bytes(data, name, at), path if isinstance(path, str) and path else name
    url = next((cell[key] for key in _URL_KEYS if cell.get(key) is not None), path)
    url = url.get("url") if isinstance(url, Mapping) else url
    if isinstance(url, str) and url.startswith("data:"):
        return None, _bytes(url.partition(",")[2], name, at), name
    if isinstance(url, str) and "://" in url:
        is_file = url.startswith("file://")
        hint = "give the path in it" if is_file else "download it, and name the file"
        raise DataError(
            f"{at}: {name} is a URL ({one_line(url, 100)}), which is not fetched: {hint} "
            'with {"type": "image", "path": "FILE"}'
        )
    if isinstance(path, str) and path:
        return path, b"", path
    known = "path" if "path" in cell else "image" if "image" in cell else None
    found = f"the keys {sorted(cell)}"
    if known is not None:
        found = f'"{known}": {one_line(repr(path), 100)}'
    raise DataError(f"{at}: {name} is given as {found}; {_EXPECTED}")


def _encoded(image: Image.Image, name: str, at: str) -> bytes:
    """Return an image in memory as a file, upright like a file's; PNG has no CMYK."""
    if image.mode in ("I", "F"):
        raise DataError(
            f"{at}: {name} has pixels of 32 bits, of which black and white are not known; give it "
            "with 8 or 16 bits"
        )
    buffer = io.BytesIO()
    try:
        upright = ImageOps.exif_transpose(image)
        (upright if image.mode in _PNG_MODES else upright.convert("RGB")).save(buffer, "PNG")
    except (OSError, ValueError) as error:
        raise DataError(f"{at}: {name} cannot be read ({one_line(str(error), 200)})") from error
    return buffer.getvalue()


def _bytes(data: Any, name: str, at: str) -> bytes:
    if isinstance(data, bytes):
        return data
    try:
        text = "".join(data.split()) if isinstance(data, str) else data  # lines of 76 characters
        return base64.b64decode(text, validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise DataError(
            f"{at}: the bytes of {name} are not base64 text ({error}); expected an encoded image "
            "file in base64"
        ) from error
