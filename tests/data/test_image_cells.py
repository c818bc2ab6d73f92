"""Cells that hold images: frozen semantics.

* An image in memory is read like its file: upright, with the shades of 16-bit pixels; pixels of 32
  bits and arrays are refused by row.
* A column of images next to ``<image>`` that would not be read is an error, with the option that
  reads it.
"""

from __future__ import annotations

import pytest
import torch
import vision

from okd_lightning.data.columns import Columns
from okd_lightning.data.image_cells import (
    cells_of,
    check_images_are_read,
    has_images,
    source_of,
)
from okd_lightning.errors import DataError
from okd_lightning.models.image_files import decoded, image_ref


def read(cell):
    path, data, name = source_of(cell, "image 1", "row 1")
    assert path is None
    return decoded(image_ref(name, None, data, "row 1"))


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("kind", ["png", "webp", "tiff"])
def test_an_image_in_memory_is_read_like_its_file(kind, orientation, tmp_path):
    exif = vision.Image.Exif()
    exif[274] = orientation
    path = tmp_path / f"x.{kind}"
    vision.picture(3, 90, 40).save(path, exif=exif, lossless=True)
    of_file = decoded(image_ref(path.name, path, b"", "row 1"))
    in_memory = read(vision.Image.open(path))
    assert of_file.size == in_memory.size == ((40, 90) if orientation > 4 else (90, 40))
    assert of_file.tobytes() == in_memory.tobytes()


def test_deep_pixels_in_memory_are_read_like_those_of_files():
    deep = torch.arange(0, 65536, 4096, dtype=torch.int32).reshape(4, 4)
    pixels = deep.numpy().astype(">u2").tobytes()
    found = read(vision.Image.frombytes("I;16B", (4, 4), pixels)).convert("L")
    assert list(found.tobytes()) == (deep // 256).flatten().tolist()
    for kind in ("int32", "float32"):
        with pytest.raises(DataError, match=r"row 1: image 1 has pixels of 32 bits"):
            read(vision.Image.fromarray(deep.numpy().astype(kind)))


@pytest.mark.parametrize("value", [torch.zeros(3, 4, 4).numpy(), torch.zeros(3, 4, 4)])
def test_arrays_are_no_images(value):
    with pytest.raises(DataError, match=r"row 1: the images .* are (ndarray|Tensor), expected"):
        cells_of({"images": value}, Columns(), "row 1")
    with pytest.raises(DataError, match=r"row 1: image 1 is given as (ndarray|Tensor);"):
        read(value)


LEFT_OUT = {
    "a prompt": {"prompt": "<image>x", "response": "b", "image": "a.png"},
    "LLaVA's rows": {"image": "a.png", "conversations": [{"from": "human", "value": "<image>\nx"}]},
    "pixels": {"prompt": "x<image>", "response": "b", "Image": vision.picture(0)},
}


@pytest.mark.parametrize("row", LEFT_OUT.values(), ids=LEFT_OUT)
def test_images_that_would_not_be_read_are_an_error(row):
    rows = [{"prompt": "x", "response": "b", "image": None}, row]
    name = next(name for name in row if name.lower() == "image")
    assert not has_images(rows, Columns(), "rows")
    with pytest.raises(DataError, match=f"rows, row 2: .*--data.images_column {name}"):
        check_images_are_read(rows, Columns(), "rows", is_text=False)
    assert has_images(rows, Columns(images=name), "rows")
    with pytest.raises(DataError, match=r"row 2: .*vision-language model.*images_column null"):
        check_images_are_read(rows, Columns(), "rows", is_text=True)
    check_images_are_read(rows, Columns(images=None), "rows", is_text=True)
    plain = [{"prompt": "x", "response": "b", "image": "a.png"}]
    check_images_are_read(plain, Columns(), "rows", is_text=True)
