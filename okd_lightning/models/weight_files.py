"""The safetensors files of one model: their names, headers, and rows of their weights.

Owns the choice of files (the same as transformers'), their headers, and one-line errors for broken
files. Reads no weights until rows are requested.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PretrainedConfig

from okd_lightning.errors import ModelError
from okd_lightning.models.sources import Source, first_line
from okd_lightning.models.wrapped_names import wrapper_advice

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_WIDTHS = ("hidden_size", "vocab_size", "intermediate_size", "num_attention_heads")
_MOST_PACKED = 16
"""2-bit numbers in one 32-bit number."""

_SPARE_LAYERS, _SPARE_NUMBERS = 1000, 1 << 28
"""Tolerated excess of the config over the files; smaller differences are found after loading."""

_LFS_POINTER = b"version https://git-lfs"


def safetensors_in(folder: Path) -> list[Path]:
    """Return the files that transformers loads from a folder, sorted by name; may be empty.

    Raises:
        ModelError: An index that cannot be read, or that names missing files.
    """
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        files = [folder / name for name in sorted(set(_weight_map(folder).values()))]
        absent = [file.name for file in files if not file.is_file()]
        if absent:
            raise ModelError(
                f"{INDEX} names {len(files)} files, of which {len(absent)} are not there (such as "
                f"{absent[0]}); copy or download the folder again"
            )
        return files
    named = _named_in_config(folder)
    return [folder / named] if named is not None and (folder / named).is_file() else []


@dataclass(frozen=True)
class _Weight:
    """A stored weight, by its file's header."""

    file: Path
    dtype: str
    shape: list[int]


class WeightFiles:
    """The safetensors files of one model, read by rows.

    Args:
        source: A folder, or a hub id, which is downloaded.
        option: How the user named it, for messages.

    Raises:
        ModelError: It has no safetensors files, or broken ones.
    """

    def __init__(self, source: Source, option: str) -> None:
        self.source = source
        self._start = f"{option} {source.given!r}"
        folder = source.folder or self._downloaded()
        try:
            files = safetensors_in(folder)
        except ModelError as error:
            raise ModelError(f"{self._start}: {error}") from error
        if not files:
            raise ModelError(f"{self._start}: {_no_files(folder)}")
        self._weights = self._weights_in(files)
        if (folder / INDEX).is_file() and files != [folder / SINGLE]:
            self._check_index(_weight_map(folder))

    @property
    def names(self) -> Iterable[str]:
        """The names under which weights are stored."""
        return self._weights.keys()

    @property
    def dtypes(self) -> dict[str, str]:
        """Number format of each name, in safetensors' notation, such as BF16 or F8_E4M3."""
        return {name: weight.dtype for name, weight in self._weights.items()}

    @property
    def num_elements(self) -> int:
        """Numbers in all files; of quantised weights, the packed numbers."""
        return sum(math.prod(weight.shape) for weight in self._weights.values())

    def check_sizes(self, config: PretrainedConfig) -> None:
        """Refuse a config of a model that is far larger than the stored weights.

        Otherwise the model would be built and initialised before the difference is found.

        Raises:
            ModelError: The config is too large; the message names the setting.
        """
        text = config.get_text_config()
        layers, width = (getattr(text, n, None) for n in ("num_hidden_layers", "hidden_size"))
        is_deep = isinstance(layers, int) and layers > len(self._weights) + _SPARE_LAYERS
        wide = [name for name in _WIDTHS if self._is_too_wide(getattr(text, name, 0), width)]
        for name in ["num_hidden_layers"] if is_deep else wide[:1]:
            raise ModelError(
                f"{self._start}: config.json has {name} {getattr(text, name)!r:.40}, of which the "
                f"files cannot hold the weights ({len(self._weights)} with {self.num_elements:,} "
                "numbers); config and weights do not belong together"
            )

    def _is_too_wide(self, size: object, width: object) -> bool:
        """Return whether a table of ``size`` rows has far more numbers than are stored."""
        if not (isinstance(size, int) and isinstance(width, int)):
            return False
        return size * width > _MOST_PACKED * self.num_elements + _SPARE_NUMBERS

    def stored_under(self, names: Sequence[str]) -> str | None:
        """Return the first of ``names`` under which a weight is stored; None if there is none."""
        return next((name for name in names if name in self._weights), None)

    def rows(
        self, names: Sequence[str], start: int, end: int, shape: Sequence[int] | None = None
    ) -> Tensor:
        """Return [end - start, ...] rows of the weight that is stored under one of ``names``.

        Args:
            names: Possible names.
            start: First row.
            end: One after the last row.
            shape: Expected shape of the whole weight; None accepts any.

        Raises:
            ModelError: It is stored under none of them, or in another shape.
        """
        found = self.stored_under(names)
        if found is None:
            cause = wrapper_advice(self.names, names[:1]) or (
                "it is missing, or transformers renames or joins weights of this architecture "
                "while it loads, which cannot be read by rows; use loading: every_rank, which "
                "names the cause"
            )
            raise ModelError(f"{self._start}: no {names[0]} is stored: {cause}")
        weight = self._weights[found]
        if shape is not None and weight.shape != list(shape):
            raise ModelError(
                f"{self._start}: {found} is {weight.shape} in the files and {list(shape)} by "
                "config.json; config and weights do not belong together"
            )
        if not weight.shape:
            return self.whole(found)
        with safe_open(weight.file, framework="pt") as opened:
            return cast(Tensor, opened.get_slice(found)[start:end])

    def whole(self, name: str) -> Tensor:
        """Return the whole weight that is stored under ``name``."""
        with safe_open(self._weights[name].file, framework="pt") as opened:
            return cast(Tensor, opened.get_tensor(name))

    def samples(self, num_numbers: int) -> Iterator[tuple[str, list[int], Tensor]]:
        """Return name, shape and about ``num_numbers`` numbers of every weight, by name.

        They are of the first, the middle and the last row; no more than those rows is read.
        """
        for name, weight in sorted(self._weights.items()):
            shape = weight.shape
            if not shape:
                yield name, shape, self.whole(name)
                continue
            with safe_open(weight.file, framework="pt") as opened:
                whole = opened.get_slice(name)
                places = sorted({0, shape[0] // 2, max(shape[0] - 1, 0)})
                rows = [whole[row : row + 1].reshape(-1) for row in places]
                step = max(1, math.prod(shape[1:]) * len(rows) // num_numbers)
                yield name, shape, torch.cat([row[::step] for row in rows])

    def _weights_in(self, files: Sequence[Path]) -> dict[str, _Weight]:
        found: dict[str, _Weight] = {}
        for file in files:
            try:
                with safe_open(file, framework="pt") as opened:
                    for name in opened.keys():  # noqa: SIM118 - not iterable itself
                        about = opened.get_slice(name)
                        found[name] = _Weight(file, about.get_dtype(), about.get_shape())
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{self._start}: {read_safetensors_error(file, error)}") from error
        return found

    def _check_index(self, weight_map: dict[str, str]) -> None:
        lost = [name for name in weight_map if name not in self._weights]
        if lost:
            raise ModelError(
                f"{self._start}: {INDEX} names {len(lost)} weights that no file holds (such as "
                f"{lost[0]}); copy or download the folder again"
            )

    def _downloaded(self) -> Path:
        try:
            return Path(
                snapshot_download(
                    self.source.name,
                    revision=self.source.revision,
                    allow_patterns=["*.safetensors", INDEX, "config.json"],
                )
            )
        except (HfHubHTTPError, LocalEntryNotFoundError) as error:
            raise ModelError(
                f"{self._start}: its weights cannot be reached: {first_line(error)}"
            ) from error


def read_safetensors_error(file: Path, error: Exception) -> str:
    """Return the message for a safetensors file that could not be opened."""
    size = file.stat().st_size
    with file.open("rb") as content:
        is_pointer = content.read(len(_LFS_POINTER)) == _LFS_POINTER
    if is_pointer:
        return f"{file.name} is a Git LFS pointer and not the weights; run git lfs pull"
    return (
        f"{file.name} ({size:,} bytes) is not a complete safetensors file ({first_line(error)}); "
        "copy or download it again"
    )


def _weight_map(folder: Path) -> dict[str, str]:
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        weight_map = index["weight_map"]
        if not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
            raise KeyError("weight_map")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(
            f"{INDEX} is broken (expected JSON with a weight_map from names to files); copy or "
            "download it again"
        ) from error
    return dict(weight_map)


def _named_in_config(folder: Path) -> str | None:
    """Return the file that config.json names as ``transformers_weights``; None without one."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    named = config.get("transformers_weights") if isinstance(config, dict) else None
    return named if isinstance(named, str) and named.endswith(".safetensors") else None


def _no_files(folder: Path) -> str:
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        return (
            f"the weights are pickled ({pickles[0]}) and not safetensors, the only format that is "
            "read; add them with transformers, whose load report must list no missing weights: "
            "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if others:
        return (
            f"neither {SINGLE} nor {INDEX} is there, though {others[0]} is; copy or download the "
            "folder again"
        )
    return f"the folder holds no safetensors ({SINGLE}, or several with {INDEX})"
