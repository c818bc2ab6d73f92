"""Settings of the teacher's own prompts: from a column, or from a template.

A privileged teacher (OPSD, arXiv 2601.18734) reads more than the student, such as the reference
solution, and scores the same response. ``teacher_prompt_ids`` makes the token ids.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches

from okd_lightning.data.row_templates import fields_of
from okd_lightning.errors import ConfigError

_FIELDS = ("prompt", "reference")
_OPTION = "--data.teacher_prompt_template"
_EXPECTED = "expected {prompt} and/or {reference} ({{ and }} for literal braces)"


@dataclass(frozen=True)
class TeacherPrompts:
    """Settings of the teacher's own prompts; exactly one of ``column`` and ``template`` is set.

    Attributes:
        max_length: Most tokens of a teacher prompt.
        column: Column of the prompts: text, or messages if the rows are chats.
        template: A text with {prompt} and/or {reference}; {{ and }} are literal braces.

    Raises:
        ConfigError: Both or neither, a limit below 1, or a template that is malformed or has
            unknown fields or none.
    """

    max_length: int
    column: str | None = None
    template: str | None = None

    def __post_init__(self) -> None:
        if self.max_length < 1:
            raise ConfigError(
                f"data.max_teacher_prompt_length must be at least 1, got {self.max_length}"
            )
        if (self.column is None) == (self.template is None):
            raise ConfigError(
                "the teacher's prompt comes from a column or from a template: give either "
                "--data.teacher_prompt_column or --data.teacher_prompt_template"
            )
        if self.template is not None:
            _check_template(self.template)

    @property
    def needs_reference(self) -> bool:
        """True if the template includes the row's dataset response."""
        return self.template is not None and "reference" in _fields(self.template)

    @property
    def reason_for_none(self) -> str:
        """Reason for a row without a teacher prompt."""
        return f"no {'reference for the ' if self.needs_reference else ''}teacher prompt"

    def fill(self, prompt: str, reference: str) -> str:
        """Fill the template; empty if the reference is missing."""
        assert self.template is not None
        if self.needs_reference and not reference:
            return ""
        return self.template.format(prompt=prompt, reference=reference)


def _fields(template: str) -> list[str]:
    return fields_of(template, _OPTION, _EXPECTED)


def _check_template(template: str) -> None:
    for name in _fields(template):
        if name not in _FIELDS:
            near = get_close_matches(name, _FIELDS, n=1)
            hint = f"; did you mean {{{near[0]}}}?" if near else ""
            raise ConfigError(
                f"{_OPTION} {template!r}: unknown field {{{name}}}; {_EXPECTED}{hint}"
            )


def teacher_prompts_from(
    column: str | None, template: str | None, max_length: int | None, default_length: int
) -> TeacherPrompts | None:
    """Return the settings of the data module's options; None if the teacher reads the prompt.

    Raises:
        ConfigError: See ``TeacherPrompts``; or a limit on prompts that do not exist.
    """
    if column is not None or template is not None:
        limit = default_length if max_length is None else max_length
        return TeacherPrompts(limit, column, template)
    if max_length is not None:
        raise ConfigError(
            f"data.max_teacher_prompt_length {max_length} has no effect: give "
            "--data.teacher_prompt_column or --data.teacher_prompt_template, or leave it out"
        )
    return None
