"""Images of rows: frozen semantics.

* An image is a part of a message, a file relative to the data file or base64 bytes; or a cell of
  the images column, one for each ``<image>``. Both give the same ids.
* A place becomes the tokens that the model's processor writes for an image of that size.
* CMYK and palettes become RGB, an animated GIF its first frame, EXIF orientation is applied.
* A missing, broken, huge or foreign file, another number of images than places, a URL, an image in
  an answer, and a response with an image's token are one line with the row.
* Examples hold references: nothing decoded, and bytes only where the row has them.
* The token cache's key has the bytes of the files.
"""

from __future__ import annotations

import itertools
import os
import struct
import tracemalloc
import zlib
from dataclasses import replace

import pytest
import torch
import vision
from transformers import AutoConfig

from okd_lightning.data.columns import Columns
from okd_lightning.data.examples import build_examples
from okd_lightning.data.image_cells import has_images
from okd_lightning.data.images import RowImages, check_image_ids
from okd_lightning.data.stored_examples import pack_examples, unpack_examples
from okd_lightning.data.teacher_prompts import TeacherPrompts
from okd_lightning.data.token_cache import cached_examples
from okd_lightning.errors import DataError
from okd_lightning.models import image_files
from okd_lightning.models.image_files import decoded, image_ref
from okd_lightning.models.processors import load_reader


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    path = vision.save("llava", tmp_path_factory.mktemp("llava"))
    tokenizer = vision.make_tokenizer("llava")
    return load_reader(path, AutoConfig.from_pretrained(path), tokenizer, "--model.student")


@pytest.fixture
def build(reader, tmp_path):
    vision.picture(0).save(tmp_path / "a.png")
    vision.picture(1, 30, 8).save(tmp_path / "b.jpg")

    def read(rows, **settings):
        rows = rows if isinstance(rows, list) else [rows]
        images = RowImages(reader, None, tmp_path)
        return build_examples(
            rows,
            reader.tokenizer,
            eos_id=1,
            where="rows.jsonl",
            **{
                "columns": Columns(),
                "max_prompt_length": 100,
                "max_response_length": 8,
                "on_overlong": "error",
                "needs_response": True,
                "images": images,
                **settings,
            },
        )

    return read


def chat(*parts, answer="b"):
    content = [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return {"messages": messages}


def image(path="a.png", **fields):
    return {"type": "image", "path": path, **fields}


def test_parts_and_column_give_the_same_examples(build, tmp_path):
    data = vision.encoded(vision.picture(0))
    text = {"role": "user", "content": "x<image>y<image>"}
    answer = {"role": "assistant", "content": "b"}
    rows = [
        chat("x", image(), "y", image("b.jpg")),
        {"messages": [text, answer], "images": ["a.png", {"path": str(tmp_path / "b.jpg")}]},
        chat("x", {"type": "image", "bytes": data}, "y", image("b.jpg")),
        {**chat("x", {"type": "image"}, "y", {"type": "image"}), "images": ["a.png", "b.jpg"]},
    ]
    found = build(rows).examples
    assert len({(e.prompt_ids, e.response_ids) for e in found}) == 1
    assert found[0].prompt_ids.count(vision.IMAGE_ID) == 32
    assert [ref.name for ref in found[0].images] == ["a.png", "b.jpg"]
    assert found[0].images[0].data == b""
    assert found[2].images[0].data
    assert len({e.images[0].sha256 for e in found}) == 1
    assert found[0].question == "x[a.png]y[b.jpg]"


def test_plain_prompts_have_a_column(build):
    row = {"prompt": "x<image>y", "response": "b", "images": "a.png"}
    (example,) = build(row).examples
    assert example.prompt_ids.count(vision.IMAGE_ID) == 16
    assert example.prompt == "x<image>y"
    renamed = {"prompt": "x<image>y", "response": "b", "picture": ["a.png"]}
    (other,) = build(renamed, columns=Columns(images="picture")).examples
    assert other.prompt_ids == example.prompt_ids
    assert has_images([row], Columns(), "rows")
    assert not has_images([{"prompt": "x<image>", "response": "b"}], Columns(), "rows")


def test_a_place_of_a_data_set_without_images_is_text(build, reader, tmp_path):
    images = RowImages(reader, None, tmp_path, are_present=False)
    (example,) = build({"prompt": "ab", "response": "b"}, images=images).examples
    assert example.images == ()


def test_pictures_become_rgb(tmp_path):
    picture = vision.picture(3)
    frames = [vision.picture(4).convert("P"), vision.picture(5).convert("P")]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    picture.convert("CMYK").save(tmp_path / "x.jpg")
    picture.convert("L").save(tmp_path / "x.bmp")
    exif = vision.Image.Exif()
    exif[274] = 6  # turned by a quarter
    picture.save(tmp_path / "turned.png", exif=exif)
    read = {
        path.name: decoded(image_ref(path.name, path, b"", "row")) for path in tmp_path.iterdir()
    }
    assert {one.mode for one in read.values()} == {"RGB"}
    assert read["x.gif"].tobytes() == frames[0].convert("RGB").tobytes()
    assert read["turned.png"].size == (10, 12)
    assert read["x.jpg"].size == (12, 10)


def test_deep_grey_pixels_keep_their_shades(tmp_path):
    """Pillow alone makes white of every value above 255."""
    deep = torch.arange(0, 65536, 4096, dtype=torch.int32).reshape(4, 4)
    for name, kind in (("x.png", "uint16"), ("y.tiff", ">u2")):
        vision.Image.fromarray(deep.numpy().astype(kind)).save(tmp_path / name)
        found = decoded(image_ref(name, tmp_path / name, b"", "row"))
        assert list(found.convert("L").tobytes()) == (deep // 256).flatten().tolist()
    for kind in ("int32", "float32"):
        vision.Image.fromarray(deep.numpy().astype(kind)).save(tmp_path / "z.tiff")
        with pytest.raises(DataError, match="pixels of 32 bits"):
            image_ref("z.tiff", tmp_path / "z.tiff", b"", "row")


def test_size_is_that_of_the_upright_picture(tmp_path):
    """The check decodes a JPEG at a part of its size."""
    exif = vision.Image.Exif()
    for orientation, kind in itertools.product(range(1, 9), ("jpg", "png", "webp", "tiff")):
        exif[274] = orientation
        path = tmp_path / f"x.{kind}"
        vision.picture(3, 90, 40).save(path, exif=exif)
        ref = image_ref(path.name, path, b"", "row")
        assert (ref.width, ref.height) == decoded(ref).size
        assert (ref.height > ref.width) == (orientation > 4)


def test_base64_may_have_lines_and_be_a_data_url(build):
    data = vision.encoded(vision.picture(0))
    lines = "\n".join(data[i : i + 76] for i in range(0, len(data), 76))
    url = f"data:image/png;base64,{data}"
    parts = (
        {"type": "image", "bytes": lines},
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "image_url", "image_url": url},
        image(url),
    )
    found = build([chat(part, "x") for part in (image(), *parts)]).examples
    assert len({e.images[0].sha256 for e in found}) == 1
    assert found[1].question == "[image 1]x"


@pytest.mark.parametrize("mode", ["CMYK", "RGBA", "L", "YCbCr"])
def test_an_image_of_pillow_in_the_column(mode, build):
    row = {"prompt": "x<image>", "response": "b", "images": [vision.picture(0).convert(mode)]}
    (example,) = build(row).examples
    assert decoded(example.images[0]).size == (12, 10)


def test_a_pipe_is_refused(build, tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(DataError, match=r"pipe.png: not a file"):
        build(chat(image("pipe.png"), "x"))


def test_ten_thousand_rows_hold_references(reader, tmp_path):
    """Their pixels would be 120 MB; names, hashes and ids are below 3 kB a row."""
    vision.picture(0, 64, 64).save(tmp_path / "0.png")
    for number in range(1, 500):
        os.link(tmp_path / "0.png", tmp_path / f"{number}.png")
    rows = [
        {"prompt": f"<image>{i}", "response": "b", "images": [f"{i % 500}.png"]}
        for i in range(10_000)
    ]
    images = RowImages(reader, None, tmp_path)
    tracemalloc.start()
    refs = [images.of_row(row, Columns(), "row", row["prompt"]) for row in rows]
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert {len(found) for found in refs} == {1}
    assert size < 3000 * len(rows)


def test_an_image_of_one_pixel_is_read(build, tmp_path):
    vision.picture(0, 1, 1).save(tmp_path / "dot.png")
    (example,) = build(chat(image("dot.png"), "x")).examples
    assert example.prompt_ids.count(vision.IMAGE_ID) == 16


def png(width: int, height: int) -> bytes:
    """A PNG's header and a beginning of its pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + crc

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(bytes(9))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels


FILES = {
    "missing.png": (None, "No such file"),
    "huge.png": (png(60_000, 60_000), "pixels"),
    "large.png": (png(9_000, 9_000), "9,000 x 9,000 pixels"),
    "text.png": (b"hello", "decoded .no image of these formats."),
    "empty.png": (b"", "'empty.png' is empty"),
    "cut.png": (png(8, 8), "cannot be decoded"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_broken_file_is_one_line_with_its_row(name, build, tmp_path):
    content, words = FILES[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words) as error:
        build([chat(image(), "x"), chat(image(name), "x")])
    assert "rows.jsonl, row 2" in str(error.value)
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_a_truncated_jpeg_is_refused(build, tmp_path):
    vision.picture(0, 64, 64).save(tmp_path / "whole.jpg")
    whole = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"row 1: the image 'cut.jpg' cannot be decoded"):
        build(chat(image("cut.jpg"), "x"))


ROWS = {
    "more places": (
        {"prompt": "<image><image>", "response": "b", "images": ["a.png"]},
        "2 <image>",
    ),
    "no place": ({"prompt": "x", "response": "b", "images": ["a.png"]}, "0 <image>"),
    "no image": (chat("<image>x", image()), "1 <image>"),
    "url": (chat({"type": "image", "url": "https://a.b/c.png"}, "x"), "is a URL"),
    "url as path": (chat(image("https://a.b/c.png"), "x"), "is a URL"),
    "image_url": (chat({"type": "image_url", "image_url": {"url": "http://a.b"}}), "is a URL"),
    "file url": (chat(image("file:///a.png"), "x"), "give the path in it"),
    "bucket": (chat(image("s3://b/a.png"), "x"), r"is a URL \(s3://b/a.png\)"),
    "null in a name": (chat(image("a\0b.png"), "x"), "null byte"),
    "long name": (chat(image("x" * 3000), "x"), r"x{100,250}\.\.\.' cannot be read"),
    "wrong data url": (chat(image("data:image/png;base64,%"), "x"), "not base64"),
    "number as path": (chat(image(3), "x"), 'given as "path": 3;'),
    "empty path": (chat(image(""), "x"), "given as \"path\": '';"),
    "marker in an answer": (chat("x", image(), answer="a<image>"), "an assistant's turn"),
    "not base64": (chat({"type": "image", "bytes": "?"}, "x"), "not base64"),
    "number": ({"prompt": "<image>", "response": "b", "images": 5}, "int"),
    "number in a list": ({"prompt": "<image>", "response": "b", "images": [5]}, "int"),
    "unknown keys": (chat({"type": "image", "file": "a.png"}), "the keys"),
    "in an answer": (chat("x", answer=[image()]), "an assistant's turn"),
    "video": (chat({"type": "video", "path": "a.mp4"}), "'video'"),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_wrong_row_is_one_line(name, build):
    row, words = ROWS[name]
    with pytest.raises(DataError, match=words) as error:
        build(row)
    assert "rows.jsonl, row 1" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_response_with_the_token_of_an_image_is_refused(build, reader):
    found = build({"prompt": "x<image>", "response": "a<image>", "images": ["a.png"]})
    with pytest.raises(DataError, match="row 1: a response has '<image>'"):
        check_image_ids(found.examples, reader.mask_ids, reader.tokenizer, "rows.jsonl")


def test_an_overlong_prompt_counts_expanded_tokens(build):
    with pytest.raises(DataError, match="row 1: the prompt has 22 tokens"):
        build(chat(image(), "x"), max_prompt_length=20)
    rows = [chat(image(), "x"), chat("x")]
    found = build(rows, max_prompt_length=20, on_overlong="skip")
    assert [e.index for e in found.examples] == [1]


def test_a_privileged_teacher_sees_what_the_student_does_not(build):
    row = {"prompt": "a caption", "response": "b", "own": "x<image>", "images": ["a.png"]}
    (example,) = build(row, teacher_prompts=TeacherPrompts(100, column="own")).examples
    assert example.images == ()
    assert vision.IMAGE_ID not in example.prompt_ids
    assert example.teacher_prompt_ids.count(vision.IMAGE_ID) == 16
    assert [ref.name for ref in example.teacher_images] == ["a.png"]
    filled = TeacherPrompts(100, template="{prompt} {reference}")
    row = chat("x", image())
    (example,) = build(row, teacher_prompts=filled).examples
    assert example.teacher_prompt_ids.count(vision.IMAGE_ID) == 16
    assert example.images == example.teacher_images


def test_images_after_the_last_learned_turn_are_left_out(build):
    row = chat("x", image())
    row["messages"] += [
        {"role": "user", "content": [image("b.jpg"), {"type": "text", "text": "y"}]},
        {"role": "assistant", "content": "c", "weight": 0},
    ]
    (example,) = build(row).examples
    assert [ref.name for ref in example.images] == ["a.png"]


def test_a_file_that_changes_is_noticed(tmp_path):
    vision.picture(0).save(tmp_path / "a.png")
    ref = image_ref("a.png", tmp_path / "a.png", b"", "row")
    vision.picture(1).save(tmp_path / "a.png")
    with pytest.raises(DataError, match="has changed"):
        decoded(ref)


def test_stored_examples_keep_references(build):
    data = vision.encoded(vision.picture(0))
    found = build([chat("x", {"type": "image", "bytes": data}, image()), chat("y")])
    assert unpack_examples(pack_examples(found)) == replace(found, skipped={})


def test_cache_key_has_the_bytes_of_the_files(reader, tmp_path, monkeypatch):
    monkeypatch.setattr("okd_lightning.data.token_cache.FEWEST_ROWS", 1)

    def read():
        return cached_examples(
            str(tmp_path / "cache"),
            [chat("x", image())],
            reader.tokenizer,
            eos_id=1,
            where="rows.jsonl",
            columns=Columns(),
            max_prompt_length=100,
            max_response_length=8,
            on_overlong="error",
            needs_response=True,
            images=RowImages(reader, None, tmp_path),
        )

    keys, num_decoded = [], []
    check = image_files._checked_size
    monkeypatch.setattr(
        image_files, "_checked_size", lambda *given: num_decoded.append(1) or check(*given)
    )
    for seed in (0, 0, 1):
        vision.picture(seed).save(tmp_path / "a.png")
        found = read()
        assert found.examples[0].images[0].sha256
        keys.append((len(list((tmp_path / "cache").iterdir())), len(num_decoded)))
    assert keys == [(1, 1), (1, 1), (2, 2)]  # a row from the cache is not decoded
