"""Constructor arguments of a DistillationModule, as a checkpoint stores them.

Plain values are stored unchanged. Models and tokenizers in memory are stored in a form from which
they can be rebuilt: a model's config (its trained weights are in the checkpoint anyway), a
tokenizer's files. Code (an optimizer class, an engine) is not stored.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from peft import PeftConfig
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from okd_lightning import teachers
from okd_lightning.errors import CheckpointError
from okd_lightning.teachers import Teacher
from okd_lightning.training.earlier_options import present_model

_CONFIG, _FILES, _PEFT, _CODE = "config", "files", "peft_config", "code"
_CLASS, _SETTINGS = "class_path", "init_args"


def stored_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the constructor's arguments by name, as primitives.

    Args:
        given: The arguments of the call.
    """
    return {name: _stored(value) for name, value in given.items() if value is not None}


def restored_arguments(
    stored: Mapping[str, Any] | None, given: Mapping[str, Any]
) -> dict[str, Any]:
    """Return constructor arguments that rebuild the module of a checkpoint.

    Args:
        stored: From ``stored_arguments``; None for a checkpoint without arguments.
        given: Arguments of this call; they replace stored ones.

    Raises:
        CheckpointError: No arguments are stored, or the student had frozen weights in memory, which
            no checkpoint holds.
    """
    if stored is None:
        if "student" not in given:
            raise CheckpointError(
                "the checkpoint is of an older version, which kept no arguments: give "
                "load_from_checkpoint(path, student=..., teacher=...)"
            )
        stored = {}
    stored = present_model(stored)
    student = None if "student" in given else stored.get("student")
    if _is(student, _CODE) or (_is(student, _CONFIG) and "student_adapter" in stored):
        raise CheckpointError(
            "the checkpoint holds an adapter on a student that was a model in memory: give "
            "load_from_checkpoint(path, student=MODEL OR FOLDER)"
        )
    found: dict[str, Any] = {}
    for name, value in stored.items():
        if name in given:
            continue
        if name == "teacher" and _is_in_memory(value):
            rank_zero_info(
                "the checkpoint's teacher was a model in memory, which it does not hold: the "
                "module has none; give load_from_checkpoint(path, teacher=MODEL OR FOLDER)"
            )
        elif not _is(value, _CODE):
            found[name] = _restored(value)
    return {**found, **given}


def plain_peft_config(config: PeftConfig) -> dict[str, Any]:
    """Return a PEFT config as primitives, for ``PeftConfig.from_peft_type``."""
    return {
        key: sorted(value) if isinstance(value, set) else getattr(value, "value", value)
        for key, value in config.to_dict().items()
    }


def peft_config_of(stored: Mapping[str, Any]) -> PeftConfig:
    """Return the PEFT config that ``plain_peft_config`` has stored.

    Raises:
        CheckpointError: The config names a module that PEFT would import.
    """
    module = stored.get("megatron_core") or "megatron.core"
    arguments = stored.get("tokenizer_kwargs") or {}
    if module != "megatron.core" or arguments.get("trust_remote_code"):
        raise CheckpointError(
            "the checkpoint's PEFT config has PEFT import code of others (megatron_core "
            f"{module!r}, tokenizer_kwargs {arguments}); take another checkpoint"
        )
    return PeftConfig.from_peft_type(**stored)


def check_arguments(
    stored: Mapping[str, Any] | None, given: Collection[str], checkpoint: str
) -> None:
    """Refuse arguments of a foreign checkpoint that would use code or a server.

    Args:
        stored: From ``stored_arguments``.
        given: Names of the arguments of this call.
        checkpoint: For messages.

    Raises:
        CheckpointError: There is such an argument; the message names the first.
    """
    for name, value in present_model(stored or {}).items():
        if name in given:
            continue
        what = _foreign_part({name: value})
        if what is not None:
            raise CheckpointError(
                f"{checkpoint} was not signed by you, and its {name} names {what}: give "
                f"load_from_checkpoint(path, {name}=...) yourself"
            )


def _foreign_part(value: Any) -> str | None:
    """Describe a server, or a repository whose attention kernel transformers would run."""
    waiting = [value]
    while waiting:
        node = waiting.pop()
        if isinstance(node, list):
            waiting += node
            continue
        if not isinstance(node, Mapping):
            continue
        for key, entry in node.items():
            if key == "url" and entry is not None:
                return "a server"
            is_kernel = str(key).endswith("attn_implementation") and isinstance(entry, str)
            if is_kernel and set("/:") & set(entry):
                return f"the kernel {entry!r}, which is downloaded and run"
            waiting.append(entry)
    return None


def _stored(value: Any) -> Any:
    if isinstance(value, bool | int | float):
        return value
    if isinstance(value, Teacher):
        return _stored_teacher(value)
    if isinstance(value, str | os.PathLike):
        return str(Path(value).absolute()) if Path(value).is_dir() else str(value)
    if isinstance(value, list | tuple):
        return [_stored(entry) for entry in value]
    if _is_by_name(value):
        return {str(name): _stored(entry) for name, entry in value.items()}
    return json.loads(json.dumps(dict(value))) if isinstance(value, Mapping) else _kept(value)


def _kept(value: Any) -> dict[str, Any]:
    """Return a form from which an object in memory can be rebuilt."""
    if isinstance(value, PreTrainedModel):
        return {"kept": _CONFIG, "value": json.loads(value.config.to_json_string(use_diff=False))}
    if isinstance(value, PreTrainedTokenizerBase):
        return {"kept": _FILES, "value": _files_of(value)}
    if isinstance(value, PeftConfig):
        return {"kept": _PEFT, "value": plain_peft_config(value)}
    return {"kept": _CODE, "value": None}


def _stored_teacher(teacher: Teacher) -> dict[str, Any]:
    """Return class and settings; a class that is not of this package is code."""
    teacher = teacher.base
    name = type(teacher).__name__
    settings = {n: _stored(value) for n, value in teacher.arguments.items() if value is not None}
    is_own = getattr(teachers, name, None) is type(teacher)
    if not is_own or _holds(list(settings.values()), _CODE):
        return {"kept": _CODE, "value": None}
    return {_CLASS: f"{teachers.__name__}.{name}", _SETTINGS: settings}


def _restored_teacher(stored: Mapping[str, Any]) -> Teacher:
    package, _, name = str(stored[_CLASS]).rpartition(".")
    kind = getattr(teachers, name, None) if package == teachers.__name__ else None
    if not (isinstance(kind, type) and issubclass(kind, Teacher)):
        raise CheckpointError(
            f"the checkpoint's teacher is a {stored[_CLASS]!r}, which is no teacher of "
            "okd-lightning; give load_from_checkpoint(path, teacher=...)"
        )
    settings = stored.get(_SETTINGS) or {}
    return kind(**{name: _restored(value) for name, value in settings.items()})


def _is_in_memory(value: Any) -> bool:
    """Return whether a stored teacher was a model in memory, or holds one."""
    return _holds(value, _CONFIG) or _holds(value, _CODE)


def _is_by_name(value: Any) -> bool:
    """Return whether a value maps names to values, and is not a model's config."""
    return isinstance(value, Mapping) and "model_type" not in value


def _holds(value: Any, kind: str) -> bool:
    """Return whether a stored value, or one of those in it, is of a kind."""
    if isinstance(value, list):
        return any(_holds(entry, kind) for entry in value)
    if not isinstance(value, Mapping):
        return False
    return _is(value, kind) or any(_holds(entry, kind) for entry in value.values())


def _restored(value: Any) -> Any:
    if isinstance(value, Mapping) and _CLASS in value:
        return _restored_teacher(value)
    if _is(value, _PEFT):
        return peft_config_of(value["value"])
    if _is(value, _FILES):
        return _tokenizer_of(value["value"])
    if isinstance(value, list):
        return [_restored(entry) for entry in value]
    if _is_by_name(value) and "kept" not in value:
        return {name: _restored(entry) for name, entry in value.items()}
    return value["value"] if _is(value, _CONFIG) else value


def _is(value: Any, kind: str) -> bool:
    return isinstance(value, Mapping) and value.get("kept") == kind


def _files_of(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Return file contents as Latin-1 text, which a weights-only reader accepts."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        return {
            str(path.relative_to(folder)): path.read_bytes().decode("latin-1") for path in paths
        }


def _tokenizer_of(files: Mapping[str, str]) -> PreTrainedTokenizerBase:
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            path = Path(folder, name).resolve()
            if Path(folder).resolve() not in path.parents:
                raise CheckpointError(
                    f"the checkpoint's tokenizer has a file {name!r}, not in its own folder, which "
                    "no run writes; give load_from_checkpoint(path, tokenizer=FOLDER)"
                )
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode("latin-1"))
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False
        )
    return tokenizer
