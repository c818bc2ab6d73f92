"""Constructor arguments of a DistillationModule, as a checkpoint stores them.

Plain values are stored as they are. Models and tokenizers in memory are stored as what they can be
rebuilt from: a model's config (its trained weights are in the checkpoint anyway), a tokenizer's
files. Code (an optimizer class, an engine) is not stored.
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

from okd_lightning.errors import CheckpointError

_CONFIG, _FILES, _PEFT, _CODE = "config", "files", "peft_config", "code"


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
        if name == "teacher" and (_is(value, _CONFIG) or _is(value, _CODE)):
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
    for name, value in (stored or {}).items():
        if name in given:
            continue
        is_server = name == "teacher_server" and value is not None
        what = "a server" if is_server else _kernel_in({name: value})
        if what is not None:
            raise CheckpointError(
                f"{checkpoint} was not signed by you, and its {name} names {what}: give "
                f"load_from_checkpoint(path, {name}=...) yourself"
            )


def _kernel_in(value: Any) -> str | None:
    """Describe a repository from which transformers would download and run an attention kernel."""
    waiting = [value]
    while waiting:
        node = waiting.pop()
        for key, entry in node.items():
            is_kernel = str(key).endswith("attn_implementation") and isinstance(entry, str)
            if is_kernel and set("/:") & set(entry):
                return f"the kernel {entry!r}, which is downloaded and run"
            waiting += [entry] if isinstance(entry, Mapping) else []
    return None


def _stored(value: Any) -> Any:
    if isinstance(value, PreTrainedModel):
        return {"kept": _CONFIG, "value": json.loads(value.config.to_json_string(use_diff=False))}
    if isinstance(value, PreTrainedTokenizerBase):
        return {"kept": _FILES, "value": _files_of(value)}
    if isinstance(value, PeftConfig):
        return {"kept": _PEFT, "value": plain_peft_config(value)}
    if isinstance(value, str | os.PathLike):
        return str(Path(value).absolute()) if Path(value).is_dir() else str(value)
    if isinstance(value, Mapping):
        return json.loads(json.dumps(dict(value)))
    return value if isinstance(value, bool | int | float) else {"kept": _CODE, "value": None}


def _restored(value: Any) -> Any:
    if _is(value, _PEFT):
        return peft_config_of(value["value"])
    if _is(value, _FILES):
        return _tokenizer_of(value["value"])
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
