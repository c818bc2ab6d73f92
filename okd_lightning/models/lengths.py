"""Whether sequences fit into the positions that a model was made for."""

from __future__ import annotations

from transformers import PretrainedConfig

from okd_lightning.errors import ConfigError


def max_positions(config: PretrainedConfig) -> int | None:
    """The longest sequence that a model was made for, where its config says so."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def check_lengths(
    student: PretrainedConfig | None,
    teacher: PretrainedConfig | None,
    student_tokens: int,
    teacher_tokens: int,
) -> None:
    """Refuse sequences that are longer than a model was made for.

    Args:
        student: The student's config; None for one that is not there yet.
        teacher: The teacher's; None where there is none.
        student_tokens: The longest sequence that the student reads.
        teacher_tokens: The longest that the teacher reads.

    Raises:
        ConfigError: Naming the model and both lengths.
    """
    for role, config, tokens in (
        ("student", student, student_tokens),
        ("teacher", teacher, teacher_tokens),
    ):
        limit = max_positions(config) if config is not None else None
        if limit is not None and tokens > limit:
            is_own = role == "teacher" and teacher_tokens != student_tokens
            kind = "teacher prompt" if is_own else "prompt"
            raise ConfigError(
                f"{kind} and response together take up to {tokens} tokens, but the {role} was "
                f"made for {limit}; lower --data.max_response_length or "
                f"--data.max_{kind.replace(' ', '_')}_length"
            )
