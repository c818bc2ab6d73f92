"""Check that a server serves the student's model, before any weights are sent to it.

vLLM drops its weights before it reads new ones: weights of another architecture leave it without
any, and the next request crashes it. This check protects a teacher's server that was given by
mistake.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from okd_lightning.bounded_files import read_json_object
from okd_lightning.engines.vllm_client import ServedModel, ServerInfo
from okd_lightning.errors import ServerError

_TIED = "tie_word_embeddings"
_SHAPE = (
    *("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "intermediate_size", _TIED),
)
"""Settings of config.json that determine the weights."""

_PROCESSED = "processed_logprobs"


def served_config(served: ServedModel, where: str) -> Mapping[str, Any] | None:
    """Return the served model's config.json, if its folder is visible on this machine.

    vLLM (0.32) reports the location of its model, but not its shape.
    """
    if served.root is None or "\0" in served.root:
        return None
    path = Path(served.root) / "config.json"
    if not path.is_file():
        return None
    return read_json_object(path, ServerError, f"{where}, config of the served model, {path}")


def check_served_student(
    student: PretrainedConfig,
    served: ServedModel,
    found: Mapping[str, Any] | None,
    info: ServerInfo,
    where: str,
) -> None:
    """Refuse a server of another model, or one that returns other log-probabilities.

    Unknown values are not compared.

    Args:
        student: The student's config.
        served: From ``/v1/models``.
        found: The served model's config.json; None if unknown.
        info: From ``/server_info``.
        where: The engine, for messages.

    Raises:
        ServerError: There is a difference; the message names it and the remedy.
    """
    if info.logprobs_mode not in (None, _PROCESSED):
        raise ServerError(
            f"{where} gives {info.logprobs_mode} as its log-probabilities, which are not those of "
            "the sampling distribution; start it with --logprobs-mode processed_logprobs"
        )
    if info.quantization is not None:
        raise ServerError(
            f"{where} serves weights quantised by {info.quantization}, and the student's are not; "
            "start it without --quantization, on the student's own folder"
        )
    difference = None if found is None else _difference(student, found)
    if difference is not None:
        raise ServerError(
            f"{where} serves {served.root or served.name!r}, {difference}: it is the server of "
            "another model, such as the teacher's, and no weights were sent to it; start it with "
            "the student as its --model, or name the student's server"
        )


def is_untied(found: Mapping[str, Any] | None) -> bool:
    """Return whether the served model is known to have a head separate from its embedding."""
    return found is not None and found.get(_TIED) is False


def keeps_old_head(found: Mapping[str, Any] | None, info: ServerInfo) -> bool:
    """Return whether the server would keep the old head of a model with tied embeddings.

    vLLM on CPUs (0.32) computes the head with a packed copy of its weights. It updates the copies
    only of layers whose own weights are loaded, which excludes a head that shares the embedding's
    table.
    """
    return info.device == "cpu" and not is_untied(found)


def _difference(student: PretrainedConfig, found: Mapping[str, Any]) -> str | None:
    """Describe the first setting that both configs have and that differs; None if none does."""
    text = student.get_text_config()
    own = {"model_type": student.model_type}
    own |= {name: getattr(text, name) for name in _SHAPE[1:] if hasattr(text, name)}
    inner = found.get("text_config")
    other = {**found, **(inner if isinstance(inner, Mapping) else {})}
    other["model_type"] = found.get("model_type")
    if other.get(_TIED) is False:  # an untied copy can serve a student with tied embeddings
        own.pop(_TIED, None)
    for name in _SHAPE:
        given = other.get(name)
        if given is not None and own.get(name) is not None and given != own[name]:
            return f"whose {name} is {given!r} where the student's is {own[name]!r}"
    return None
