"""Image files: read within limits, checked, and decoded to RGB.

Only formats with decoders in Pillow itself are opened. A file is decoded once when the data is
read, so that a broken one is an error before training, and again for each batch that holds it.
"""

from __future__ import annotations

import io
import warnings
from hashlib import sha256
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from okd_lightning.errors import DataError, one_line
from okd_lightning.records.images import ImageRef

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Formats of Pillow that are read; others (such as EPS) start programs."""

MOST_BYTES = 64 << 20
MOST_PIXELS = 64 << 20
"""Largest file, and largest image (8192 x 8192); neither is decoded beyond it."""

_UNREADABLE = (Exception,)
"""Errors of Pillow's decoders for a broken file, which can be of any type."""


def image_ref(name: str, path: Path | None, data: bytes, at: str) -> ImageRef:
    """Return the reference of an image after decoding it once.

    Args:
        name: As the user gave it.
        path: Its file; None where ``data`` is the encoded file.
        data: The encoded file, where there is no path.
        at: File and row, for messages.

    Raises:
        DataError: The file is missing, too large, of another format, or broken.
    """
    what = f"{at}: the image {name!r}"
    content = data if path is None else _content(path, what)
    image = _decoded(content, what)
    width, height = image.size
    kept = ("", data) if path is None else (str(path), b"")
    return ImageRef(name, *kept, sha256(content).hexdigest(), width, height)


def decoded(ref: ImageRef) -> Image.Image:
    """Return the RGB image of a reference.

    Raises:
        DataError: The file is no longer what was read with the data.
    """
    what = f"the image {ref.name!r}"
    content = ref.data or _content(Path(ref.path), what)
    if sha256(content).hexdigest() != ref.sha256:
        raise DataError(f"{what} has changed since the data was read; start the run again")
    return _decoded(content, what)


def _content(path: Path, what: str) -> bytes:
    try:
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise DataError(
                f"{what} has {size:,} bytes, more than {MOST_BYTES:,}; store it smaller, or delete "
                "the row"
            )
        return path.read_bytes()
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(
            f"{what} cannot be read ({path}: {reason}); paths are relative to the folder of the "
            "data file"
        ) from error


def _decoded(content: bytes, what: str) -> Image.Image:
    """Return the RGB image of a file: the first frame, upright by its EXIF orientation."""
    if len(content) > MOST_BYTES:
        raise DataError(f"{what} has {len(content):,} bytes, more than {MOST_BYTES:,}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of sizes that are refused below
            image = Image.open(io.BytesIO(content), formats=FORMATS)
            width, height = image.size
            if width * height <= MOST_PIXELS:
                return ImageOps.exif_transpose(image).convert("RGB")
    except Image.DecompressionBombError as error:
        raise DataError(f"{what} has more than {MOST_PIXELS:,} pixels; scale it down") from error
    except _UNREADABLE as error:
        is_unknown = isinstance(error, UnidentifiedImageError)
        reason = "no image of these formats" if is_unknown else one_line(str(error), 200)
        raise DataError(
            f"{what} cannot be decoded ({reason or type(error).__name__}); expected a complete "
            f"file of {', '.join(FORMATS)}"
        ) from error
    raise DataError(
        f"{what} has {width:,} x {height:,} pixels, more than {MOST_PIXELS:,}; scale it down"
    )
