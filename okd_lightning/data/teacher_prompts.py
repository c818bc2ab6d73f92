"""The teacher's own prompts: from a column, or from a template.

A privileged teacher (OPSD, arXiv 2601.18734) reads more than the student, such as the reference
solution, and scores the same response. Owns the settings and the ids of these prompts; the
response's ids are the student's, so that both sides have the same loss tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

from transformers import PreTrainedTokenizerBase

from okd_lightning.data.chat_turns import read_turns
from okd_lightning.data.columns import (
    Columns,
    RawRow,
    read_tools,
    require_column,
    require_whole_characters,
)
from okd_lightning.data.images import RowImages, num_places
from okd_lightning.data.layouts import Layout
from okd_lightning.data.row_templates import fields_of
from okd_lightning.data.templates import ChatRenderer, Message
from okd_lightning.errors import ConfigError, DataError
from okd_lightning.models.processors import ImageReader
from okd_lightning.models.text_ids import TextEncoder
from okd_lightning.records.batches import Example
from okd_lightning.records.images import ImageRef

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
            f"data.max_teacher_prompt_length {max_length} has nothing to act on: give "
            "--data.teacher_prompt_column or --data.teacher_prompt_template, or leave it out"
        )
    return None


def _cell(prompts: TeacherPrompts, row: RawRow) -> Any:
    assert prompts.column is not None
    return row.get(prompts.column)


def _text(prompts: TeacherPrompts, example: Example, row: RawRow, at: str) -> str:
    if prompts.template is not None:
        return prompts.fill(example.prompt, example.response)
    value = _cell(prompts, row)
    if value is not None and not isinstance(value, str):
        raise DataError(
            f"{at}: the teacher prompt ({prompts.column!r}) is {type(value).__name__}, "
            "expected text, as the prompt is"
        )
    require_whole_characters(value or "", f"{at}: the teacher prompt ({prompts.column!r})")
    return value or ""


def _chat(
    prompts: TeacherPrompts, columns: Columns, example: Example, row: RawRow, at: str
) -> list[Message]:
    """Return the messages of the teacher's prompt; empty if there are none."""
    if prompts.template is None:
        if not _cell(prompts, row):
            return []
        own = replace(columns, messages=prompts.column, response="")
        turns = read_turns(row, own, at)
        if turns.is_answered:
            raise DataError(
                f"{at}: the teacher prompt ({prompts.column!r}) ends with the assistant's turn; "
                "give the messages that stand before the answer"
            )
        return list(turns.messages)
    messages = list(read_turns(row, columns, at).asked)
    asking = [i for i, message in enumerate(messages) if message["role"] == "user"]
    if not asking:
        raise DataError(
            f"{at}: the chat has no user message that the teacher's template could replace; "
            "give --data.teacher_prompt_column instead"
        )
    last = messages[asking[-1]]
    content = prompts.fill(last["content"], example.response)
    if not content:
        return []
    messages[asking[-1]] = {**last, "content": content}
    return messages


@dataclass(frozen=True)
class _Seen:
    """The images of teacher prompts, and the processor that reads them."""

    images: RowImages
    reader: ImageReader

    def into(
        self,
        texts: Sequence[str],
        chats: Sequence[Sequence[Message]],
        rows: Sequence[RawRow],
        places: Sequence[str],
        columns: Columns,
    ) -> tuple[list[str], list[tuple[ImageRef, ...]]]:
        """Return the prompts with the tokens of their images, and each row's images.

        Args:
            texts: The prompts; an empty one shows none.
            chats: The messages that they were rendered from; empty for plain prompts.
            rows: The raw rows.
            places: File and row of each, for messages.
            columns: The columns with the prompt's messages and its images.
        """
        refs: list[tuple[ImageRef, ...]] = []
        for number, (text, row, at) in enumerate(zip(texts, rows, places, strict=True)):
            plain = None if chats else text
            found = self.images.of_row(row, columns, at, plain) if text else ()
            refs.append(found[: num_places(chats[number])] if chats else found)
        shown = [
            self.images.prompt(text, own, at, is_rendered=bool(chats), reader=self.reader)
            for text, own, at in zip(texts, refs, places, strict=True)
        ]
        return shown, refs


def with_image_prompts(
    examples: Sequence[Example],
    rows: Sequence[RawRow],
    encoder: TextEncoder,
    images: RowImages,
    **settings: Any,
) -> list[Example]:
    """Add the teacher's prompt where it differs from the student's, for rows with images.

    It differs where the teacher has other prompts, another processor or another chat template.

    Args:
        examples: One a row, in the rows' order, of any length.
        rows: The raw rows.
        encoder: Encoder of the run's tokenizer.
        images: Reads the images.
        **settings: Further arguments of ``with_teacher_prompts``.
    """
    prompts, reader = settings["teacher_prompts"], images.teacher or images.student
    if prompts is None and images.teacher is None:
        return list(examples)
    if images.teacher is not None:
        encoder = TextEncoder(images.teacher.tokenizer)
    found = with_teacher_prompts(examples, rows, encoder, seen=_Seen(images, reader), **settings)
    if prompts is not None:
        return found
    return [
        replace(e, teacher_prompt_ids=(), teacher_images=())
        if e.teacher_prompt_ids == e.prompt_ids
        else e
        for e in found
    ]


def with_teacher_prompts(
    examples: Sequence[Example],
    rows: Sequence[RawRow],
    encoder: TextEncoder,
    *,
    columns: Columns,
    layout: Layout,
    teacher_prompts: TeacherPrompts | None,
    where: str,
    seen: _Seen | None = None,
) -> list[Example]:
    """Add the teacher's prompt to every example for which there is one.

    A plain prompt is tokenized like the student's. In a chat the template replaces the last user
    message's content, and the chat before the response is rendered again by the chat template.
    Without settings, for a teacher with another tokenizer, it is the prompt of the student: its
    text, or its messages by the teacher's chat template.

    Args:
        examples: One a row, in the rows' order, of any length.
        rows: The raw rows.
        encoder: Encoder of the tokenizer that the teacher reads with.
        columns: The columns that were read.
        layout: Layout of the rows.
        teacher_prompts: The settings; None for the student's prompts.
        where: The dataset's name for messages.
        seen: The images of the prompts; None where the models read text alone.

    Raises:
        DataError: The column is missing or of the wrong type, or a chat cannot be rendered.
    """
    if teacher_prompts is not None and teacher_prompts.column is not None:
        require_column(rows[0], "teacher_prompt", teacher_prompts.column, where)
    places = [f"{where}, row {number}" for number in range(1, len(rows) + 1)]
    triples = list(zip(examples, rows, places, strict=True))
    chats: list[list[Message]] = []
    if layout == "text":
        texts = [
            example.prompt if teacher_prompts is None else _text(teacher_prompts, example, row, at)
            for example, row, at in triples
        ]
    else:
        renderer = ChatRenderer(
            encoder.tokenizer,
            where=where,
            settings=columns.chat_template_kwargs,
            images=None if seen is None else seen.images.are_present,
        )
        chats = [
            list(read_turns(row, columns, at).asked)
            if teacher_prompts is None
            else _chat(teacher_prompts, columns, example, row, at)
            for example, row, at in triples
        ]
        texts = [
            renderer.prompt(chat, read_tools(row, columns, at), at) if chat else ""
            for chat, row, at in zip(chats, rows, places, strict=True)
        ]
    refs: list[tuple[ImageRef, ...]] = [()] * len(rows)
    if seen is not None:
        own_column = None if teacher_prompts is None else teacher_prompts.column
        read = columns if own_column is None else replace(columns, messages=own_column)
        texts, refs = seen.into(texts, chats, rows, places, read)
    encoded = iter(
        encoder.prompts(
            [text for text in texts if text],
            is_rendered=layout == "chat",
            limit=None if teacher_prompts is None else teacher_prompts.max_length,
        )
    )
    return [
        replace(
            example,
            teacher_prompt_ids=tuple(next(encoded) if text else ()),
            teacher_images=own,
        )
        for example, text, own in zip(examples, texts, refs, strict=True)
    ]


def with_foreign_prompts(
    examples: Sequence[Example],
    rows: Sequence[RawRow],
    tokenizer: PreTrainedTokenizerBase,
    student: PreTrainedTokenizerBase,
    **settings: Any,
) -> list[Example]:
    """Add the prompt of a teacher with another tokenizer to every example.

    A whole text has its first token as prompt; the teacher reads that token's text, and none where
    it is a special one. A prompt without any of the teacher's ids becomes its bos or, without one,
    its eos: something has to stand before the first token that it predicts.

    Args:
        examples: One a row, in the rows' order, of any length.
        rows: The raw rows.
        tokenizer: The teacher's.
        student: The run's.
        **settings: Further arguments of ``with_teacher_prompts``.

    Raises:
        DataError: See ``with_teacher_prompts``; the teacher's tokenizer has no chat template.
    """
    columns, prompts = settings["columns"], settings["teacher_prompts"]
    if settings["layout"] == "text" and columns.prompt is None:
        special = {*student.all_special_ids}
        examples = [
            replace(e, prompt="" if e.prompt_ids[0] in special else e.prompt) for e in examples
        ]
    found = with_teacher_prompts(examples, rows, TextEncoder(tokenizer), **settings)
    opening = (
        tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    )
    if opening is None or prompts is not None:
        return found
    return [e if e.teacher_prompt_ids else replace(e, teacher_prompt_ids=(opening,)) for e in found]
