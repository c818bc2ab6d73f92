"""Check that sequences fit into a model's context length."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig

from okd_lightning.errors import ConfigError


def max_positions(config: PretrainedConfig) -> int | None:
    """Return a model's context length, in tokens; None if its config has no such field.

    A scaled rotary embedding (YaRN, linear, dynamic, Llama 3) extends the original context by its
    factor. ``max_position_embeddings`` is the extended length in some configs (Llama 3.1) and the
    original one in others (Qwen 2.5 with YaRN): the longer of the two is used. If layer types have
    their own scaling (Gemma 3), the shortest is used.
    """
    text = config.get_text_config()
    positions: int | None = getattr(text, "max_position_embeddings", None)
    if positions is None:
        return None
    scalings = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    by_layer = [value for value in scalings.values() if isinstance(value, Mapping)]
    reaches = [_reach(scaling, positions) for scaling in by_layer or [scalings]]
    return max(positions, min(reaches))


def _reach(scaling: Mapping[str, Any], positions: int) -> int:
    """Return the original context times the factor; ``positions`` without scaling."""
    factor = scaling.get("factor")
    if not isinstance(factor, int | float):
        return positions
    return int(factor * (scaling.get("original_max_position_embeddings") or positions))


def check_lengths(
    student: PretrainedConfig | None,
    teacher: PretrainedConfig | None,
    student_tokens: int,
    teacher_tokens: int,
    teacher_role: str = "teacher",
) -> None:
    """Refuse sequences that are longer than a model's context.

    Args:
        student: The student's config; None if not yet known.
        teacher: The teacher's; None without a teacher.
        student_tokens: The longest sequence that the student reads.
        teacher_tokens: The longest that the teacher reads.
        teacher_role: The teacher's name in the message.

    Raises:
        ConfigError: Too long; the message names the model and both lengths.
    """
    for role, config, tokens in (
        ("student", student, student_tokens),
        (teacher_role, teacher, teacher_tokens),
    ):
        limit = max_positions(config) if config is not None else None
        if limit is not None and tokens > limit:
            is_own = role == teacher_role and teacher_tokens != student_tokens
            kind = "teacher prompt" if is_own else "prompt"
            raise ConfigError(
                f"{kind} and response together take up to {tokens} tokens, but the context of the "
                f"{role} is {limit}; lower --data.max_response_length or "
                f"--data.max_{kind.replace(' ', '_')}_length"
            )
