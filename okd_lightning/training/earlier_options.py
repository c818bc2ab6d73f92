"""Translation of earlier versions' teacher options to those of this version.

Checkpoints of earlier versions are translated, and a user who types an earlier option gets an error
with the present one. No other file knows the earlier options.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

_SELF = {"frozen": "FrozenSelf", "ema": "AveragedSelf", "live": "LiveSelf"}
_CACHE, _SERVER = ("teacher_cache", "folder"), ("teacher_server", "url")

EARLIER = {"self_teacher": "", **dict((_CACHE, _SERVER))}
"""Replaced settings of ``model``: the teacher's class, and the meaning of a plain text value."""


def present_model(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings of ``model`` with the teacher as a path or a class with its settings.

    Args:
        model: Settings of any version.
    """
    own = {name: value for name, value in model.items() if name not in EARLIER}
    kind, settings = _teacher(model)
    if kind is not None:
        own["teacher"] = {"class_path": f"okd_lightning.teachers.{kind}", "init_args": settings}
    return own


def present_mark(checkpoint: Mapping[str, Any]) -> str | None:
    """Return ``Teacher.mark`` of the run that wrote a checkpoint's own part."""
    kind = checkpoint.get("self_teacher")
    return _SELF.get(str(kind), checkpoint.get("teacher"))


def present_spelling(model: Mapping[str, Any]) -> str:
    """Return the options that replace earlier ones; empty for none.

    Args:
        model: Settings of ``model`` with earlier options.
    """
    kind, settings = _teacher(model)
    if kind is None:
        return ""
    given = {f"--model.teacher.{name}": value for name, value in settings.items()}
    words = {"--model.teacher": kind, **given}
    return " ".join(f"{name} {shlex.quote(str(value))}" for name, value in words.items())


def _teacher(model: Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """Return class and settings of the teacher that earlier options name; None for none."""
    own = model.get("self_teacher")
    if own is not None:
        return _SELF.get(str(own), "FrozenSelf"), {}
    cache, server = (_settings(model, *which) for which in (_CACHE, _SERVER))
    if server:
        return "ServedTeacher", server
    if cache:
        return "CachedTeacher", {"model": model.get("teacher"), **cache}
    return None, {}


def _settings(model: Mapping[str, Any], name: str, main: str) -> dict[str, Any]:
    """Return one option's settings; a plain text is the value of its main setting."""
    value = model.get(name)
    if isinstance(value, Mapping) and "kept" in value:  # settings that a checkpoint does not hold
        return {}
    if isinstance(value, Mapping):
        return {key: entry for key, entry in value.items() if entry is not None}
    return {} if value is None else {main: value}
