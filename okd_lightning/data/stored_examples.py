"""Serialization of tokenized examples: ragged rows as flat arrays, with a checksum.

The bytes are a 16-byte checksum followed by a safetensors file (no pickle). Incomplete or changed
bytes are refused.
"""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from collections.abc import Iterable, Sequence
from dataclasses import astuple
from hashlib import blake2b
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from okd_lightning.data.examples import ExampleSet
from okd_lightning.errors import CacheError
from okd_lightning.records import Chat, Example
from okd_lightning.records.images import ImageRef

_DIGEST_SIZE = 16
_IDS = ("prompt_ids", "response_ids", "teacher_prompt_ids")
_TEXTS = ("prompt", "response", "chat", "images", "about")


def pack_examples(found: ExampleSet) -> bytes:
    """Return the examples as bytes.

    Raises:
        TypeError: A chat has a value that JSON cannot represent.
    """
    examples = found.examples
    arrays = {"index": np.array([example.index for example in examples], np.int64)}
    for name in _IDS:
        _put(arrays, name, [getattr(example, name) for example in examples], np.int32)
    masks = [example.prompt_mask for example in examples]
    arrays["prompt_mask"] = np.array([flag for mask in masks for flag in mask], np.bool_)
    about = json.dumps(
        {
            "skipped": dict(found.skipped),
            "num_cut": found.num_cut,
            "notes": found.notes,
            "usual_length": found.usual_length,
        }
    )
    texts: dict[str, Iterable[str]] = {
        "prompt": [example.prompt for example in examples],
        "response": [example.response for example in examples],
        "chat": [_chat_text(example.chat) for example in examples],
        "images": [_images_text(example) for example in examples],
        "about": [about],
    }
    for name in _TEXTS:
        rows = [np.frombuffer(_encoded(text), np.uint8) for text in texts[name]]
        _put(arrays, name, rows, np.uint8)
    content = save(arrays)
    return blake2b(content, digest_size=_DIGEST_SIZE).digest() + content


def unpack_examples(content: bytes) -> ExampleSet:
    """Return the examples of ``pack_examples``.

    Raises:
        CacheError: The bytes are incomplete or changed.
    """
    digest, tensors = content[:_DIGEST_SIZE], content[_DIGEST_SIZE:]
    if blake2b(tensors, digest_size=_DIGEST_SIZE).digest() != digest:
        raise CacheError("not what was written there")
    try:
        arrays = load(tensors)
    except SafetensorError as error:
        raise CacheError(str(error)) from error
    prompts, responses, teacher_prompts = (_rows(arrays, name) for name in _IDS)
    texts = {
        name: [bytes(row).decode("utf-8", "surrogatepass") for row in _rows(arrays, name)]
        for name in _TEXTS
    }
    ends = [0, *accumulate(len(prompt) for prompt in prompts)]
    flags = arrays["prompt_mask"].tolist()
    examples = tuple(
        Example(
            index=index,
            prompt_ids=tuple(prompts[i]),
            prompt_mask=tuple(flags[start:end]),
            response_ids=tuple(responses[i]),
            prompt=texts["prompt"][i],
            response=texts["response"][i],
            teacher_prompt_ids=tuple(teacher_prompts[i]),
            chat=_chat(texts["chat"][i]),
            **_images_of(texts["images"][i]),
        )
        for i, (index, (start, end)) in enumerate(
            zip(arrays["index"].tolist(), pairwise(ends), strict=True)
        )
    )
    about = json.loads(texts["about"][0])
    return ExampleSet(examples, **{**about, "notes": tuple(about["notes"])})


def _put(arrays: dict[str, np.ndarray], name: str, rows: Sequence[Any], dtype: Any) -> None:
    arrays[f"{name}_lengths"] = np.array([len(row) for row in rows], np.int64)
    flat = [np.asarray(row, dtype) for row in rows]
    arrays[name] = np.concatenate(flat) if flat else np.zeros(0, dtype)


def _rows(arrays: dict[str, np.ndarray], name: str) -> list[list[int]]:
    flat = arrays[name].tolist()
    ends = [0, *accumulate(arrays[f"{name}_lengths"].tolist())]
    return [flat[start:end] for start, end in pairwise(ends)]


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _images_text(example: Example) -> str:
    """Return the references of an example's images as text; empty without any."""
    sides = example.images, example.teacher_images
    if not any(sides):
        return ""
    fields = [
        [[*astuple(ref)[:2], b64encode(ref.data).decode(), *astuple(ref)[3:]] for ref in side]
        for side in sides
    ]
    return json.dumps(fields)


def _images_of(text: str) -> dict[str, Any]:
    """Return the images of ``_images_text``, as fields of an example."""
    if not text:
        return {}
    sides = [
        tuple(ImageRef(name, path, b64decode(data), *rest) for name, path, data, *rest in side)
        for side in json.loads(text)
    ]
    return dict(zip(("images", "teacher_images"), sides, strict=True))


def _chat_text(chat: Chat | None) -> str:
    return "" if chat is None else json.dumps([chat.messages, chat.tools])


def _chat(text: str) -> Chat | None:
    if not text:
        return None
    messages, tools = json.loads(text)
    return Chat(tuple(messages), None if tools is None else tuple(tools))
