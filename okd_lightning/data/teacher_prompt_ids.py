"""Teacher prompts as token ids: read from rows, rendered, tokenized, with their images.

The response's ids are the student's, so that both sides have the same loss tokens. The settings are
those of ``teacher_prompts``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
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
from okd_lightning.data.teacher_prompts import TeacherPrompts
from okd_lightning.data.templates import ChatRenderer, Message
from okd_lightning.errors import DataError
from okd_lightning.models.processors import ImageReader
from okd_lightning.models.text_ids import TextEncoder
from okd_lightning.records.batches import Example
from okd_lightning.records.images import ImageRef


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
                "give the messages before the answer"
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
class PromptedRows:
    """Rows of a dataset, and the settings that make the teacher's prompts from them.

    Attributes:
        rows: The raw rows.
        columns: The columns that were read.
        layout: Layout of the rows.
        teacher_prompts: Settings of the teacher's own prompts; None for the student's prompts.
        where: The dataset's name for messages.
    """

    rows: Sequence[RawRow]
    columns: Columns
    layout: Layout
    teacher_prompts: TeacherPrompts | None
    where: str

    @property
    def places(self) -> list[str]:
        """Dataset and number (from 1) of each row, for messages."""
        return [f"{self.where}, row {number}" for number in range(1, len(self.rows) + 1)]

    @property
    def image_columns(self) -> Columns:
        """Columns of the prompts' messages and images."""
        own_column = None if self.teacher_prompts is None else self.teacher_prompts.column
        return self.columns if own_column is None else replace(self.columns, messages=own_column)

    def texts(self, examples: Sequence[Example]) -> list[str]:
        """Return the teacher's prompts of plain rows; empty where a row has none."""
        prompts = self.teacher_prompts
        if prompts is None:
            return [example.prompt for example in examples]
        triples = zip(examples, self.rows, self.places, strict=True)
        return [_text(prompts, example, row, at) for example, row, at in triples]

    def chats(self, examples: Sequence[Example]) -> list[list[Message]]:
        """Return the messages of the teacher's prompts of chats; empty where a row has none."""
        prompts, columns = self.teacher_prompts, self.columns
        return [
            list(read_turns(row, columns, at).asked)
            if prompts is None
            else _chat(prompts, columns, example, row, at)
            for example, row, at in zip(examples, self.rows, self.places, strict=True)
        ]

    def rendered(self, chats: Sequence[list[Message]], renderer: ChatRenderer) -> list[str]:
        """Return chats as text by the chat template, with their rows' tools."""
        return [
            renderer.prompt(chat, read_tools(row, self.columns, at), at) if chat else ""
            for chat, row, at in zip(chats, self.rows, self.places, strict=True)
        ]


@dataclass(frozen=True)
class _PromptImages:
    """The images of teacher prompts, and the processor that reads them."""

    images: RowImages
    reader: ImageReader

    def insert(
        self, texts: Sequence[str], chats: Sequence[Sequence[Message]], prompted: PromptedRows
    ) -> tuple[list[str], list[tuple[ImageRef, ...]]]:
        """Return the prompts with the tokens of their images, and each row's images.

        Args:
            texts: The prompts; an empty one has no images.
            chats: The messages that they were rendered from; empty for plain prompts.
            prompted: The rows.
        """
        columns, places = prompted.image_columns, prompted.places
        refs: list[tuple[ImageRef, ...]] = []
        for number, (text, row, at) in enumerate(zip(texts, prompted.rows, places, strict=True)):
            plain = None if chats else text
            found = self.images.of_row(row, columns, at, plain) if text else ()
            refs.append(found[: num_places(chats[number])] if chats else found)
        shown = [
            self.images.prompt(text, own, at, is_rendered=bool(chats), reader=self.reader)
            for text, own, at in zip(texts, refs, places, strict=True)
        ]
        return shown, refs


def _add_prompts(
    examples: Sequence[Example],
    prompted: PromptedRows,
    encoder: TextEncoder,
    images: _PromptImages | None = None,
) -> list[Example]:
    """Add the teacher's prompt to every example for which there is one.

    Without settings, for a teacher with another tokenizer, it is the prompt of the student: its
    text, or its messages by the teacher's chat template.

    Args:
        examples: One per row, in the rows' order, of any length.
        prompted: The rows.
        encoder: Encoder of the tokenizer that the teacher reads with.
        images: The images of the prompts; None where the models read text alone.
    """
    prompts, is_chat = prompted.teacher_prompts, prompted.layout == "chat"
    if prompts is not None and prompts.column is not None:
        require_column(prompted.rows[0], "teacher_prompt", prompts.column, prompted.where)
    chats: list[list[Message]] = []
    if is_chat:
        renderer = ChatRenderer(
            encoder.tokenizer,
            where=prompted.where,
            settings=prompted.columns.chat_template_kwargs,
            images=None if images is None else images.images.are_present,
        )
        chats = prompted.chats(examples)
        texts = prompted.rendered(chats, renderer)
    else:
        texts = prompted.texts(examples)
    refs: list[tuple[ImageRef, ...]] = [()] * len(examples)
    if images is not None:
        texts, refs = images.insert(texts, chats, prompted)
    limit = None if prompts is None else prompts.max_length
    present = [text for text in texts if text]
    encoded = iter(encoder.prompts(present, is_rendered=is_chat, limit=limit))
    return [
        replace(
            example,
            teacher_prompt_ids=tuple(next(encoded) if text else ()),
            teacher_images=own,
        )
        for example, text, own in zip(examples, texts, refs, strict=True)
    ]


def _add_image_prompts(
    examples: Sequence[Example], prompted: PromptedRows, encoder: TextEncoder, images: RowImages
) -> list[Example]:
    """Add the teacher's prompt where it differs from the student's, for rows with images.

    It differs where the teacher has its own prompts, its own processor or its own chat template.
    """
    prompts, reader = prompted.teacher_prompts, images.teacher or images.student
    if prompts is None and images.teacher is None:
        return list(examples)
    if images.teacher is not None:
        encoder = TextEncoder(images.teacher.tokenizer)
    found = _add_prompts(examples, prompted, encoder, _PromptImages(images, reader))
    if prompts is not None:
        return found
    return [
        replace(e, teacher_prompt_ids=(), teacher_images=())
        if e.teacher_prompt_ids == e.prompt_ids
        else e
        for e in found
    ]


def _add_foreign_prompts(
    examples: Sequence[Example],
    prompted: PromptedRows,
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
) -> list[Example]:
    """Add the prompt of a teacher with another tokenizer to every example.

    A whole text has its first token as prompt; the teacher reads that token's text, and no text
    where it is a special token. A prompt that the teacher's tokenizer maps to no ids becomes its
    bos or, without one, its eos: the teacher needs one token before the first that it predicts.
    """
    if prompted.layout == "text" and prompted.columns.prompt is None:
        special = {*student.all_special_ids}
        examples = [
            replace(e, prompt="" if e.prompt_ids[0] in special else e.prompt) for e in examples
        ]
    found = _add_prompts(examples, prompted, TextEncoder(teacher))
    opening = teacher.bos_token_id if teacher.bos_token_id is not None else teacher.eos_token_id
    if opening is None or prompted.teacher_prompts is not None:
        return found
    return [e if e.teacher_prompt_ids else replace(e, teacher_prompt_ids=(opening,)) for e in found]


def add_teacher_prompts(
    examples: Sequence[Example],
    prompted: PromptedRows,
    encoder: TextEncoder,
    *,
    teacher_tokenizer: PreTrainedTokenizerBase | None,
    images: RowImages | None,
) -> list[Example]:
    """Add the teacher's prompt to the examples where it is not the student's prompt.

    A plain prompt is tokenized like the student's. In a chat the template replaces the last user
    message's content, and the chat before the response is rendered again by the chat template.

    Args:
        examples: One per row, in the rows' order, of any length.
        prompted: The rows, and the settings of the teacher's prompts.
        encoder: Encoder of the run's tokenizer.
        teacher_tokenizer: The teacher's tokenizer where it has another one; None for a teacher
            that reads the student's ids.
        images: Reads the images of rows; None where the models read text alone.

    Raises:
        DataError: The column is missing or of the wrong type, or a chat cannot be rendered, for
            instance because the teacher's tokenizer has no chat template.
    """
    if teacher_tokenizer is not None:
        return _add_foreign_prompts(examples, prompted, encoder.tokenizer, teacher_tokenizer)
    if images is not None:
        return _add_image_prompts(examples, prompted, encoder, images)
    if prompted.teacher_prompts is not None:
        return _add_prompts(examples, prompted, encoder)
    return list(examples)
