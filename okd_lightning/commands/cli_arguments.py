"""Preparation of typed arguments for LightningCLI's parser.

Resolves packaged configs by name. Takes a checkpoint's own config where only ``--ckpt_path`` is
given. Finds the last checkpoint. Drops a method's settings where another class of method is typed.
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jsonargparse
import yaml
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

import okd_lightning
from okd_lightning.bounded_files import check_yaml, load_yaml, read_text, require_regular
from okd_lightning.checkpoints.files import newest_checkpoint
from okd_lightning.commands.class_options import classes_first
from okd_lightning.commands.cli_callbacks import replace_retyped
from okd_lightning.commands.cli_errors import method_names
from okd_lightning.commands.config_trust import FLAG
from okd_lightning.commands.default_folder import RUNS, only_run
from okd_lightning.commands.given_options import Layer, flattened, layers
from okd_lightning.commands.saved_config import config_to_use
from okd_lightning.commands.teacher_options import check_earlier_options
from okd_lightning.errors import CheckpointError, ConfigError, UsageError, one_line
from okd_lightning.training.config_paths import user_path

LAST = "last"
"""Value of ``--ckpt_path``: the run folder's newest checkpoint; a new run where it has none."""

ENDS = tuple(
    f"--trainer.{name}"
    for name in ("max_steps", "max_epochs", "max_time", "min_steps", "min_epochs")
)
"""Options that end a run."""

OF_ONE_RUN = {
    "--method": "name the methods in --methods, and settings of one in a YAML file given there",
    "--seed_everything": "give --seeds 0,1,2",
    "--seed": "give --seeds 0,1,2",
    "--ckpt_path": "an unfinished comparison continues by itself, with the same command",
    "--trainer.default_root_dir": "give --out",
    "--trainer.logger": "every run logs into its own folder below --out",
    "--trainer.fast_dev_run": "give --budget steps=1",
}
"""Options of fit that the runs of a comparison cannot share, and what to do instead."""

_CONFIG_OPTIONS = ("--config", "-c")
# argparse itself recognises numbers such as -1 and -0.5
_NEGATIVE = re.compile(r"-(\d+\.|(\d+\.?\d*|\.\d+)[eE][-+]?\d+|\.?inf)")
_FOLDER = "default_root_dir"


def prepare(arguments: Sequence[str], can_type: bool = True) -> list[str]:
    """Return the command and its arguments for the parser, with configs inlined as YAML text.

    Args:
        arguments: A command and the words after it.
        can_type: Whether the user's own command has the options of fit.

    Raises:
        ConfigError: A config does not exist or is broken.
        CheckpointError: A ``--ckpt_path`` does not exist, is not ours, or is not trusted.
        UsageError: A setting of a class that is not named.
    """
    command, *rest = arguments
    is_trusted, rest = take_flag(rest)
    rest = _expand_homes(_split_equals(_attach_negatives(_spell_infinity(rest))))
    configs = [(name, load_config(name)) for name in _values(rest, _CONFIG_OPTIONS)]
    check_earlier_options(_without(rest, _CONFIG_OPTIONS), [config for _, config in configs])
    checkpoint = _last(_values(rest, ("--ckpt_path",)))
    is_whole = checkpoint == LAST and _can_begin(rest, [c for _, c in configs])
    if checkpoint == LAST:
        folder = _run_folder(rest, [c for _, c in configs])
        if folder is None and is_whole and command == "fit":
            pass  # the run is found later, by its parsed settings
        else:
            folder = folder or only_run() or RUNS
            checkpoint = last_checkpoint(command, folder)
            rest = _without(rest, ("--ckpt_path",))
            rest += ["--ckpt_path", checkpoint] if checkpoint is not None else []
    if checkpoint is not None and not is_whole:
        given = [config for _, config in configs]
        typed_words = _without(rest, _CONFIG_OPTIONS)
        own = config_to_use(checkpoint, typed_words, given, is_trusted, can_type)
        configs.insert(0, (checkpoint, own))
    replace_retyped(configs, rest)
    if "--help" in rest or "-h" in rest:
        configs = []
    typed = _last(_values(rest, ("--method", "--method.class_path")))
    _drop_other_methods(configs, typed)
    inlined = [part for _, c in configs for part in ("--config", yaml.safe_dump(c))]
    ordered = classes_first(_without(rest, _CONFIG_OPTIONS), [config for _, config in configs])
    return [command, *inlined, *ordered]


def take_flag(arguments: Sequence[str]) -> tuple[bool, list[str]]:
    """Return whether ``--trust_checkpoint`` was typed, and the other arguments.

    Raises:
        UsageError: The flag has a value that is neither true nor false.
    """
    kept, is_trusted, words = [], False, list(arguments)
    while words:
        name, equals, value = (word := words.pop(0)).partition("=")
        if name != FLAG:
            kept.append(word)
            continue
        if not equals and words and words[0].lower() in ("true", "false"):
            value, equals = words.pop(0), "="
        if equals and value.lower() not in ("true", "false"):
            raise UsageError(f"{FLAG} {value!r}: expected nothing after it, or true or false")
        is_trusted = value.lower() != "false"
    return is_trusted, kept


def read_comments_as_text() -> None:
    """Make jsonargparse keep a value such as '#### (.+)' as text.

    jsonargparse reads values as YAML, in which this is a comment and so null. Where null is allowed
    too, as for a pattern or a template, the text would be lost silently.
    """
    load = jsonargparse.get_loader("yaml")
    if getattr(load, "is_ours", False):
        return

    def loader(text: str) -> Any:
        check_yaml(text)
        try:
            value = load(text)
        except (ValueError, RecursionError) as error:  # such as a number of 5,000 digits
            raise yaml.YAMLError(one_line(str(error), 200)) from error
        return text if value is None and text.lstrip().startswith("#") else value

    loader.is_ours = True  # type: ignore[attr-defined]
    jsonargparse.set_loader("yaml", loader, (yaml.YAMLError,))


def shared_options(arguments: Sequence[str]) -> list[str]:
    """Return the options of fit that all runs of a comparison with a budget can share."""
    kept: list[str] = []
    is_kept = True
    for word in arguments:
        if word.startswith("--"):
            name = word.partition("=")[0]
            own = (
                name == start or name.startswith(f"{start}.")
                for start in (*OF_ONE_RUN, *ENDS, FLAG)
            )
            is_kept = not any(own)
        kept += [word] if is_kept else []
    return kept


def _run_folder(arguments: Sequence[str], configs: Sequence[dict[str, Any]]) -> Path | None:
    """Return the run's folder before parsing: typed, or of the last config."""
    sections = [config.get("trainer") for config in configs]
    named = [s["default_root_dir"] for s in sections if isinstance(s, dict) and _FOLDER in s]
    typed = _values(arguments, (f"--trainer.{_FOLDER}",))
    given = [*(name for name in named if name), *typed]
    return user_path(given[-1]) if given else None


def _can_begin(arguments: Sequence[str], configs: Sequence[dict[str, Any]]) -> bool:
    """Return whether a command could begin a run by itself; at a restart it is then used as it is.

    (On top of a checkpoint's config it would add its callbacks to those that it had added before.)
    """
    sections = [config.get("model") for config in configs]
    is_typed = any(a.partition("=")[0].startswith("--model.student") for a in arguments)
    return is_typed or any(isinstance(s, dict) and "student" in s for s in sections)


def last_checkpoint(command: str, folder: Path) -> str | None:
    """Return the checkpoint that ``--ckpt_path last`` names; None for a new run.

    Raises:
        CheckpointError: There is none to measure, or none that can be read.
    """
    found = newest_checkpoint(folder)
    if found is None and command != "fit":
        raise CheckpointError(
            f"--ckpt_path last: there are no checkpoints in {folder / 'checkpoints'}; give "
            "--trainer.default_root_dir the folder of a run"
        )
    known = (
        f"the run continues from {found}" if found else "there is no checkpoint: a new run begins"
    )
    rank_zero_info(f"{folder}: {known}")
    return found


def packaged_configs() -> dict[str, Path]:
    """Return name → file of the configs that come with the package (or lie in a checkout)."""
    package = Path(okd_lightning.__file__).parent
    for folder in (package / "configs", package.parent / "configs"):
        if folder.is_dir():
            return {
                str(path.relative_to(folder).with_suffix("")): path
                for path in sorted(folder.rglob("*.yaml"))
            }
    return {}


def load_config(name: str) -> dict[str, Any]:
    """Read a config by its path or, where it comes with the package, by its name.

    Raises:
        ConfigError: The config does not exist, or is broken.
    """
    path = user_path(name)
    require_regular(path, ConfigError, f"--config {name!r}")
    if not path.is_file():
        packaged = packaged_configs()
        if name not in packaged:
            near = difflib.get_close_matches(name, packaged, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(
                f"--config {name!r}: no such file, and no packaged config of that name "
                f"(there are {', '.join(packaged) or 'none'}){hint}"
            )
        path = packaged[name]
    try:
        config = load_yaml(read_text(path, ConfigError, f"--config {name!r}"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or one_line(str(error), 200)
        raise ConfigError(f"--config {name!r}{where}: not valid YAML ({problem})") from error
    if not isinstance(config, dict):
        found = "an empty file" if config is None else f"a {type(config).__name__}"
        raise ConfigError(
            f"--config {name!r}: expected sections such as model:, data:, method:, trainer:, "
            f"got {found}"
        )
    for section in ("model", "data", "method", "trainer"):
        if isinstance(config.get(section), list):
            raise ConfigError(
                f"--config {name!r}: the section {section} holds a list, {config[section]!r}; "
                f"expected options, such as {section}: {{OPTION: VALUE}}"
            )
    return config


def chosen_options(
    command: str | None, arguments: Sequence[str], defaults: Mapping[str, Any]
) -> dict[str, Layer]:
    """Return the options that the user chose: typed, or set in a config of the user's own.

    Packaged configs, defaults, and the config of a checkpoint do not count. Configs are written for
    ``fit``; for other commands only typed options count.

    Args:
        command: Such as "fit"; None for an instance without a command.
        arguments: Result of ``prepare``.
        defaults: Option → default.
    """
    if command is None:
        return {}
    *configs, typed = layers(arguments)
    if command != "fit" or "--ckpt_path" in arguments:
        return {command: typed}
    packaged = [flattened(load_config(name)) for name in packaged_configs()] if configs else []
    chosen: Layer = {}
    for layer in configs:
        chosen = {option: value for option, value in chosen.items() if option not in layer}
        if not any(_is_part(layer, config) for config in packaged):
            chosen |= {o: v for o, v in layer.items() if v != defaults.get(o)}
    return {command: chosen | typed}


def _is_part(layer: Layer, config: Layer) -> bool:
    """Return whether a config contains all of a layer, except what ``prepare`` changes."""
    kept = {o: v for o, v in layer.items() if not o.startswith("trainer.callbacks")}
    return all(option in config and config[option] == value for option, value in kept.items())


def class_name(method: Any) -> str | None:
    """Return the class that a ``method`` entry of a config names, without its module."""
    return class_path(method).rsplit(".", 1)[-1] or None


def class_path(method: Any) -> str:
    """Return the name or class path in a ``method`` entry of a config; empty without one."""
    path = method.get("class_path") if isinstance(method, dict) else method
    return path if isinstance(path, str) else ""


def _drop_other_methods(configs: list[tuple[str, dict[str, Any]]], typed: str | None) -> None:
    """Keep a ``method`` section only where it is of the class that the run will have.

    A section of a class that does not exist is kept too: the parser refuses it.
    """
    wanted, known = class_name(typed), method_names()
    for name, config in reversed(configs):
        found = class_name(config.get("method"))
        if found is None:
            continue
        if wanted is None:
            wanted = found
        elif found != wanted and ("." in class_path(config["method"]) or found in known):
            method = config.pop("method")
            if isinstance(method, dict) and method.get("init_args"):
                rank_zero_warn(
                    f"{name} sets up {found}; this run uses {wanted}, so {found}'s settings "
                    f"({', '.join(method['init_args'])}) are dropped"
                )


def _spell_infinity(arguments: Sequence[str]) -> list[str]:
    """Spell a callback's ``inf``, as help shows it, as ``.inf``, which YAML reads as a number."""
    spelt = list(arguments)
    for i, word in enumerate(arguments):
        option, equals, value = word.rpartition("=")
        named = option or (arguments[i - 1] if i else "")
        if value == "inf" and named.startswith(("--method.", "--trainer.callbacks.")):
            spelt[i] = f"{option}{equals}.inf"
    return spelt


def _attach_negatives(arguments: Sequence[str]) -> list[str]:
    """Write ``--option -1e-3`` as ``--option=-1e-3``: argparse takes the number for an option."""
    attached: list[str] = []
    for word in arguments:
        option = attached[-1] if attached else ""
        if _NEGATIVE.fullmatch(word) and option.startswith("--") and "=" not in option:
            attached[-1] = f"{option}={word}"
        else:
            attached.append(word)
    return attached


def _expand_homes(arguments: Sequence[str]) -> list[str]:
    """Expand ``~`` in values that are read before parsing."""
    expanded = list(arguments)
    for i, (option, value) in enumerate(itertools.pairwise(arguments), 1):
        if option in (*_CONFIG_OPTIONS, "--ckpt_path") and value.startswith("~"):
            expanded[i] = str(user_path(value))
    return expanded


def _split_equals(arguments: Sequence[str]) -> list[str]:
    methods, places = ("--method", "--method.class_path"), ("--ckpt_path", f"--trainer.{_FOLDER}")
    known = (*_CONFIG_OPTIONS, *methods, *places)
    split: list[str] = []
    for argument in arguments:
        option, equals, value = argument.partition("=")
        split.extend([option, value] if equals and option in known else [argument])
    return split


def _values(arguments: Sequence[str], options: Sequence[str]) -> list[str]:
    if arguments and arguments[-1] in options:
        raise UsageError(f"{arguments[-1]} needs a value after it")
    return [b for a, b in itertools.pairwise(arguments) if a in options]


def _without(arguments: Sequence[str], options: Sequence[str]) -> list[str]:
    kept, skip = [], False
    for argument in arguments:
        if skip:
            skip = False
        elif argument in options:
            skip = True
        else:
            kept.append(argument)
    return kept


def _last(values: Sequence[str]) -> str | None:
    return values[-1] if values else None
