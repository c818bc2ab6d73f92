"""Options of ``okd-lightning shrink``, and their meaning for a model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonargparse
import torch

from okd_lightning.errors import ConfigError, UsageError
from okd_lightning.models import DTypeName
from okd_lightning.models.shrinking import Widths
from okd_lightning.training.config_paths import output_folder

_RANGE = re.compile(r"(\d{1,6})(?:-(\d{1,6}))?")


def shrink_parser() -> jsonargparse.ArgumentParser:
    """Return the parser of the options that ``shrink`` has besides ``--data.*`` of ``fit``."""
    parser = jsonargparse.ArgumentParser(
        prog="okd-lightning shrink",
        usage="okd-lightning shrink --model TEACHER --layers N --out FOLDER [--data.* VALUE ...]",
        exit_on_error=False,
        allow_abbrev=False,
        description="Cut a student from a teacher: drop the layers, neurons, heads and channels "
        "whose absence costs least on calibration rows, and write a Hugging Face folder. The "
        "--data.* options are those of fit; --data.train names the calibration rows.",
    )
    add = parser.add_argument
    add("--model", type=str, required=True, help="the teacher: a folder, hub id or .gguf file")
    add("--out", type=str, required=True, help="the folder to write")
    add(
        "--layers",
        type=int,
        help="number of layers to keep; the dropped ones are chosen by the loss",
    )
    add("--drop_layers", type=str, help="layers to drop, counted from 0, such as 8-13,20")
    add("--intermediate", type=float, help="neurons of each MLP: a share below 1, or a number")
    add("--heads", type=float, help="query heads: a share below 1, or a number")
    add("--hidden", type=float, help="channels of the residual stream (RMSNorm models): likewise")
    add("--rows", type=int, default=32, help="calibration rows; default: %(default)s")
    add(
        "--tried",
        type=int,
        default=4,
        help="layers that are tried in each round, of those with the least block influence; "
        "default: %(default)s",
    )
    add(
        "--dtype",
        type=DTypeName,
        help="number format to load, measure and write in; default: the model's own, float32 for "
        "a .gguf file",
    )
    add("--device", type=str, default="auto", help="such as cpu or cuda:1; default: a GPU if any")
    add("--seed", type=int, default=0, help="of the choice of rows; default: %(default)s")
    add("--overwrite", action="store_true", help="write also into a folder with files")
    return parser


def data_options(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split words into the command's own and the ``--data.*`` options with their values."""
    own: list[str] = []
    of_data: list[str] = []
    words = list(arguments)
    while words:
        word = words.pop(0)
        is_of_data = word.startswith("--data.")
        (of_data if is_of_data else own).append(word)
        if is_of_data and "=" not in word and words and not words[0].startswith("--"):
            of_data.append(words.pop(0))
    return own, of_data


def checked_options(options: Any, widths: Widths) -> Path:
    """Return the folder to write.

    Raises:
        UsageError: Options that exclude each other, are missing, or are out of range.
    """
    if options.layers is not None and options.drop_layers is not None:
        raise UsageError(
            "--layers and --drop_layers both choose the layers: give --layers for their number, or "
            "--drop_layers for the layers themselves"
        )
    if options.layers is None and options.drop_layers is None and widths == Widths():
        raise UsageError(
            "nothing to cut: give --layers, --drop_layers, --intermediate, --heads or --hidden; "
            "to convert a .gguf file as it is, --layers with the number that it has"
        )
    for name in ("rows", "tried"):
        if getattr(options, name) < 1:
            raise UsageError(f"--{name} {getattr(options, name)}: expected at least 1")
    return output_folder(options.out, "--out")


def num_dropped_layers(config: Any, options: Any) -> int:
    """Return the number of dropped layers.

    Raises:
        ConfigError: Numbers that the model does not have.
    """
    have = int(getattr(config.get_text_config(), "num_hidden_layers", None) or 0)
    if options.drop_layers is not None:
        return len(layer_numbers(options.drop_layers, have))
    if options.layers is None:
        return 0
    if not 1 <= options.layers <= have:
        raise ConfigError(
            f"--layers {options.layers}: {options.model!r} has {have} layers; give the number that "
            f"stays, 1 to {have}"
        )
    return have - int(options.layers)


def layer_numbers(text: str | None, have: int) -> tuple[int, ...]:
    """Return the numbers in a list such as 8-13,20, ascending.

    Raises:
        UsageError: The list cannot be read.
        ConfigError: A layer that the model does not have, or none would stay.
    """
    found: set[int] = set()
    for word in (text or "").replace(" ", "").split(",") if text is not None else ():
        parts = _RANGE.fullmatch(word)
        first, last = (int(n) for n in (parts[1], parts[2] or parts[1])) if parts else (1, 0)
        if first > last:
            raise UsageError(f"--drop_layers {text!r}: expected numbers and ranges such as 8-13,20")
        if last >= have:
            raise ConfigError(
                f"--drop_layers {text!r}: the model has {have} layers, numbered 0 to {have - 1}"
            )
        found.update(range(first, last + 1))
    if found and len(found) == have:
        raise ConfigError(f"--drop_layers {text!r}: no layer would stay; leave at least one")
    return tuple(sorted(found))


def chosen_device(name: str) -> torch.device:
    """Return the device of ``--device``.

    Raises:
        UsageError: It is not available.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f"--device {name!r} is not available here; give cpu, or a GPU such as cuda:0"
        ) from error
    return device
