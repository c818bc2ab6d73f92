"""The teacher on the command line: earlier spellings, and settings of a class of teacher.

``--model.teacher`` takes a folder or hub id, a config, or a class with settings. The parser accepts
any mapping as a config, so settings that fit no class are found here.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import jsonargparse

from okd_lightning import teachers
from okd_lightning.commands.cli_errors import readable, subclass_names
from okd_lightning.commands.given_options import Layer, flattened, layers
from okd_lightning.errors import UsageError
from okd_lightning.teachers import Teacher
from okd_lightning.training.config_paths import user_path
from okd_lightning.training.earlier_options import EARLIER, present_spelling
from okd_lightning.training.importable_classes import class_here

_TEACHER = "model.teacher"
_NEAR = 0.75


def check_earlier_options(typed: Sequence[str], configs: Sequence[Mapping[str, Any]]) -> None:
    """Refuse options of earlier versions that name a teacher, with their present spelling.

    Args:
        typed: The words of the command line.
        configs: The user's configs.

    Raises:
        UsageError: One was given.
    """
    given: Layer = {}
    for layer in (*map(flattened, configs), *layers(typed)):
        given |= layer
    earlier = [option for option in given if option.split(".")[1:2] in ([name] for name in EARLIER)]
    if not earlier:
        return
    model: dict[str, Any] = {"teacher": given.get(_TEACHER)}
    for option in earlier:
        _, name, *rest = option.split(".")
        if name == "self_teacher" or given[option] is None:
            model[name] = given[option]
        else:
            model[name] = {**(model.get(name) or {}), (*rest, EARLIER[name])[0]: given[option]}
    spelling = present_spelling(model)
    advice = f"give {spelling}" if spelling else "leave it out"
    raise UsageError(f"--{earlier[0]} is no longer an option: {advice}")


def check_teacher(value: Any, words: Sequence[str]) -> None:
    """Refuse settings that no class of teacher takes, and a misspelt class.

    Args:
        value: ``model.teacher``, as it was parsed.
        words: Result of ``prepare``.

    Raises:
        UsageError: The message names the setting, or the nearest class.
    """
    given: Layer = {}
    for layer in layers(words):
        given |= layer
    name = given.get(_TEACHER)
    if isinstance(value, str):
        _check_name(value)
    elif isinstance(value, dict) and "model_type" not in value:
        _check_settings(name, value)


def _check_name(name: str) -> None:
    if name.startswith("[") and not user_path(name).exists():
        raise UsageError(
            f"--{_TEACHER} {name}: expected one folder or hub id; several models are a class with "
            f"a list: --{_TEACHER} TeacherEnsemble --{_TEACHER}.teachers '{name}' (one "
            "distribution), or RoutedTeachers (one for each row)"
        )
    near = difflib.get_close_matches(name, _names(), n=1, cutoff=_NEAR)
    if near and not user_path(name).exists():
        raise UsageError(
            f"--{_TEACHER} {name}: there is no such folder or class of teacher; did you mean "
            f"{near[0]}?"
        )


def _check_settings(name: Any, settings: Mapping[str, Any]) -> None:
    kind = class_here(name) if isinstance(name, str) else None
    first = next(iter(settings), "")
    if kind is None or not issubclass(kind, Teacher):
        near = difflib.get_close_matches(str(name), _names(), n=1, cutoff=_NEAR)
        hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(_names())}"
        shown = "" if name is None else f" after --{_TEACHER} {name}"
        raise UsageError(
            f"--{_TEACHER}.{first}{shown}: expected a class of teacher before its settings, or a "
            f"config with model_type{hint}"
        )
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument(f"--{_TEACHER}", type=Teacher)
    try:
        parser.parse_object({_TEACHER: {"class_path": name, "init_args": dict(settings)}})
    except jsonargparse.ArgumentError as error:
        raise UsageError(readable(error)) from error
    raise UsageError(f"--{_TEACHER} {name}: these settings do not fit: {', '.join(settings)}")


def _names() -> list[str]:
    known = subclass_names(Teacher)
    return [name for name in known if name in teachers.__all__ and name != "NoTeacher"]
