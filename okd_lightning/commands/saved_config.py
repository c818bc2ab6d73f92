"""A checkpoint's own config: read, checked for trust, with its paths resolved.

Where only ``--ckpt_path`` is given, the run is built from this config. Its author is the
checkpoint's, so ``config_trust`` checks it before anything is imported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from okd_lightning.bounded_files import load_yaml
from okd_lightning.checkpoints.files import read_checkpoint
from okd_lightning.checkpoints.signature import can_sign, is_own_run
from okd_lightning.commands.config_trust import FLAG, foreign_parts, texts_in
from okd_lightning.commands.given_options import flattened, layers, options_of, parsed
from okd_lightning.errors import CheckpointError
from okd_lightning.training.config_paths import relocate, user_path
from okd_lightning.training.earlier_options import present_model
from okd_lightning.training.importable_classes import allowed_class, class_here

_CHECKPOINTS = "checkpoints"
_MOVED = {
    f"okd_lightning.{before}.{name}": f"okd_lightning.{now}.{name}"
    for before, now, names in (
        ("rollouts", "engines", ("TransformersEngine", "VLLMEngine", "VLLMServer")),
        ("advantages", "rewards", ("AnswerMatch", "PlainFunction", "RougeL", "ToolCallMatch")),
    )
    for name in names
}
"""Import paths in configs of earlier checkpoints, and where the classes are now."""


def config_of(path: str, checkpoint: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a checkpoint's config for comparison; None if it holds none. Nothing is built from it.

    Args:
        path: Of the checkpoint.
        checkpoint: From ``read_checkpoint``.

    Raises:
        CheckpointError: The stored config cannot be read as one.
    """
    config = _read(path, checkpoint)
    if config is not None:
        relocate(config, checkpoint["okd_lightning"].get("started_in"), path, allowed_class)
    return config


def config_to_use(
    path: str,
    typed: Sequence[str],
    configs: Sequence[Mapping[str, Any]],
    is_trusted: bool,
    can_type: bool = True,
) -> dict[str, Any]:
    """Return the config of a checkpoint that a run is built from.

    Args:
        path: Of the checkpoint.
        typed: Options and values of the command line.
        configs: Given now, as they were read.
        is_trusted: Whether the user trusts the checkpoint's author.
        can_type: Whether the command has options in place of the config's.

    Returns:
        The sections; the run's folder is that of the checkpoint.

    Raises:
        CheckpointError: The checkpoint has no config, or it names code or servers that are not the
            user's.
    """
    checkpoint = read_checkpoint(path)
    config = _read(path, checkpoint)
    if config is None:
        raise CheckpointError(
            f"--ckpt_path {path!r} was written from Python and holds no config; "
            "give --model.* and --data.* as well, or load it in Python"
        )
    own = checkpoint["okd_lightning"]
    started_in = own.get("started_in")
    if is_trusted or is_own_run(own):
        relocate(config, started_in, path, class_here)
    else:
        given = frozenset(_texts(typed, configs))
        relocate(
            config, started_in, path, lambda c: class_here(c) if c in given else allowed_class(c)
        )
        _leave_out_foreign(path, config, given, _options(typed, configs), can_type)
    if isinstance(trainer := config.setdefault("trainer", {}), dict):
        trainer["default_root_dir"] = str(run_folder_of(path))
    return config


def run_folder_of(checkpoint: str) -> Path:
    """Return the folder of the run that a checkpoint belongs to, by the checkpoint's path."""
    folder = user_path(checkpoint).parent
    return folder.parent if folder.name == _CHECKPOINTS else folder


def flag_needed(config: Mapping[str, Any]) -> str:
    """Return the flag that a printed command needs to continue from a checkpoint; often empty.

    Args:
        config: A run's sections.
    """
    is_plain = next(foreign_parts(config), None) is None
    return "" if is_plain or can_sign() else f" {FLAG}"


def _read(path: str, checkpoint: Mapping[str, Any]) -> dict[str, Any] | None:
    own = checkpoint["okd_lightning"]
    text = own.get("config") if isinstance(own, Mapping) else None
    if text is None:
        return None
    try:
        config = load_yaml(text) if isinstance(text, str) else None
    except yaml.YAMLError:
        config = None
    started_in = own.get("started_in")
    if not isinstance(config, dict) or not isinstance(started_in, str | None):
        raise CheckpointError(
            f"--ckpt_path {path!r}: its config is not that of a run; take another checkpoint"
        )
    moved: dict[str, Any] = _with_moved(config)
    if isinstance(model := moved.get("model"), dict):
        moved["model"] = present_model(model)
    return moved


def _with_moved(value: Any) -> Any:
    """Return a copy of a config's value in which moved classes have their present import path."""
    if isinstance(value, dict):
        return {name: _with_moved(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_with_moved(inner) for inner in value]
    return _MOVED.get(value, value) if isinstance(value, str) else value


def _leave_out_foreign(
    path: str,
    config: dict[str, Any],
    given: frozenset[str],
    options: frozenset[str],
    can_type: bool,
) -> None:
    """Remove foreign parts that were typed again; refuse all others."""
    for part in list(foreign_parts(config, given)):
        section, _, name = part.setting.partition(".")
        if part.is_broken:
            raise CheckpointError(
                f"--ckpt_path {path!r}: its config has {part}; take another checkpoint"
            )
        if part.setting not in options:
            instead = f"give --{part.setting} yourself, or " if can_type else ""
            raise CheckpointError(
                f"--ckpt_path {path!r} was not signed by you, and its config names {part}: "
                f"{instead}add {FLAG} if you trust its author"
            )
        if name:
            config.get(section, {}).pop(name, None)
        else:
            config.pop(section, None)


def _texts(typed: Sequence[str], configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return all texts that were typed or are in a given config."""
    values = [parsed(text) for _, text in options_of(typed)]
    return [text for value in (*typed, *values, *configs) for text in texts_in(value)]


def _options(typed: Sequence[str], configs: Sequence[Mapping[str, Any]]) -> frozenset[str]:
    """Return names of options that were typed or are in a given config."""
    found = [name for layer in layers(typed) for name in layer]
    return frozenset([*found, *(name for config in configs for name in flattened(config))])
