"""Image files: read within limits, checked, and decoded to RGB.

Only formats with decoders in Pillow itself are opened. A file is decoded once when the data is
read, so that a broken one is an error before training, and again for each batch that holds it. Rows
from the token cache are not decoded: the bytes of their files are unchanged.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from okd_lightning.errors import DataError, one_line
from okd_lightning.records.images import ImageRef

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Formats of Pillow that are read; others (such as EPS) start programs."""

MOST_BYTES = 64 << 20
MOST_PIXELS = 64 << 20
"""Largest file, and largest image (8192 x 8192); neither is decoded beyond it."""

_LONGEST_NAME = 200
"""Most characters of a name in a message; a path may be a whole file in base64."""

_TURNED = (5, 6, 7, 8)
"""EXIF orientations that exchange width and height."""

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
    what = f"{at}: the image {_shown(name)}"
    content = data if path is None else _content(path, what)
    width, height = _checked_size(content, what)
    kept = ("", data) if path is None else (str(path), b"")
    return ImageRef(name, *kept, sha256(content).hexdigest(), width, height)


def image_hash(name: str, path: Path | None, data: bytes, at: str) -> str:
    """Return the hash of an encoded file, which is not decoded; see ``image_ref``.

    Raises:
        DataError: The file is missing or too large.
    """
    content = data if path is None else _content(path, f"{at}: the image {_shown(name)}")
    return sha256(content).hexdigest()


def decoded(ref: ImageRef) -> Image.Image:
    """Return the RGB image of a reference.

    Raises:
        DataError: The file is no longer what was read with the data.
    """
    what = f"the image {_shown(ref.name)}"
    content = ref.data or _content(Path(ref.path), what)
    if sha256(content).hexdigest() != ref.sha256:
        raise DataError(f"{what} has changed since the data was read; start the run again")
    return _decoded(content, what)


def _shown(name: str) -> str:
    return repr(one_line(name, _LONGEST_NAME))


def _content(path: Path, what: str) -> bytes:
    try:
        if not path.is_file():  # a pipe or a device has no end
            path.stat()
            raise OSError("not a file")
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise DataError(
                f"{what} has {size:,} bytes, more than {MOST_BYTES:,}; store it smaller, or delete "
                "the row"
            )
        return path.read_bytes()
    except (OSError, ValueError) as error:  # a path with a null character is a ValueError
        reason = getattr(error, "strerror", None) or str(error)
        place = one_line(str(path), _LONGEST_NAME)
        raise DataError(
            f"{what} cannot be read ({place}: {reason}); paths are relative to the folder of the "
            "data file"
        ) from error


def _checked_size(content: bytes, what: str) -> tuple[int, int]:
    """Return the upright width and height of a file, all of which is decoded."""
    with _naming(content, what):
        image = _opened(content, what)
        width, height = image.size
        # a JPEG at an eighth of its size: half of the time
        is_smaller = image.draft("RGB", (1, 1)) is not None
        _rgb(image, what)
        if not is_smaller:
            width, height = image.size  # loading turns a TIFF
        is_turned = image.getexif().get(ExifTags.Base.Orientation) in _TURNED
        return (height, width) if is_turned else (width, height)


def _decoded(content: bytes, what: str) -> Image.Image:
    """Return the RGB image of a file: the first frame, upright by its EXIF orientation."""
    with _naming(content, what):
        return _rgb(ImageOps.exif_transpose(_opened(content, what)), what)


def _opened(content: bytes, what: str) -> Image.Image:
    image = Image.open(io.BytesIO(content), formats=FORMATS)
    width, height = image.size
    if width * height > MOST_PIXELS:
        raise DataError(
            f"{what} has {width:,} x {height:,} pixels, more than {MOST_PIXELS:,}; scale it down"
        )
    return image


def _rgb(image: Image.Image, what: str) -> Image.Image:
    if image.mode in ("I", "F"):
        raise DataError(
            f"{what} has pixels of 32 bits, of which black and white are not known; store it with "
            "8 or 16 bits"
        )
    if image.mode.startswith("I;16"):  # Pillow would make white of all above 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


@contextmanager
def _naming(content: bytes, what: str) -> Iterator[None]:
    """Raise errors of Pillow within the block as errors of the data."""
    if not content:
        raise DataError(f"{what} is empty; expected a file of {', '.join(FORMATS)}")
    if len(content) > MOST_BYTES:
        raise DataError(f"{what} has {len(content):,} bytes, more than {MOST_BYTES:,}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of sizes that are refused
            yield
    except DataError:
        raise
    except Image.DecompressionBombError as error:
        raise DataError(f"{what} has more than {MOST_PIXELS:,} pixels; scale it down") from error
    except _UNREADABLE as error:
        is_unknown = isinstance(error, UnidentifiedImageError)
        reason = "no image of these formats" if is_unknown else one_line(str(error), 200)
        raise DataError(
            f"{what} cannot be decoded ({reason or type(error).__name__}); expected a complete "
            f"file of {', '.join(FORMATS)}"
        ) from error
