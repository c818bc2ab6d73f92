"""Whether sequences fit the positions that a model was made for."""

from __future__ import annotations

from transformers import PreTrainedModel

from okd_lightning.errors import ConfigError
from okd_lightning.models.causal_lm import max_positions


def check_lengths(
    student: PreTrainedModel | None,
    teacher: PreTrainedModel | None,
    num_tokens: int,
    teacher_tokens: int | None,
) -> None:
    """Refuse sequences that are longer than a model was made for.

    Args:
        student: The student.
        teacher: The teacher, or None without one.
        num_tokens: The longest that the student reads.
        teacher_tokens: The longest that the teacher reads; None for the same.

    Raises:
        ConfigError: Naming the model and both lengths.
    """
    own = teacher_tokens or num_tokens
    for role, model, tokens in (
        ("student", student, num_tokens),
        ("teacher", teacher, own),
    ):
        limit = max_positions(model.config) if model is not None else None
        if limit is not None and tokens > limit:
            kind = "teacher prompt" if role == "teacher" and own != num_tokens else "prompt"
            raise ConfigError(
                f"{kind} and response together take up to {tokens} tokens, but the {role} was "
                f"made for {limit}; lower --data.max_response_length or "
                f"--data.max_{kind.replace(' ', '_')}_length"
            )
