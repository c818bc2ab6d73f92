"""Rows of chat messages to examples: rendered by the template, loss on the assistant's tokens only.

Each stretch of the rendering is tokenized apart, so that no token reaches over the edge of a turn:
the masks are exact, and what a rollout continues ends just where the generation prompt ends.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from okd_lightning.data.columns import (
    Columns,
    RawRow,
    read_answer,
    read_messages,
    read_tools,
)
from okd_lightning.data.templates import ChatRenderer, Message, RenderedChat
from okd_lightning.data.tokens import encode_continuations, encode_texts
from okd_lightning.records import Chat, Example


@dataclass(frozen=True)
class _Chat:
    """A rendered row, and what its last assistant turn says as a person reads it."""

    rendered: RenderedChat
    response: str
    source: Chat


def _is_blank_answer(message: Message) -> bool:
    is_blank = not message["content"].strip() and not message.get("tool_calls")
    return message["role"] == "assistant" and is_blank


def read_turns(row: RawRow, columns: Columns, at: str) -> list[Message]:
    """The messages of a row without a blank answer at their end.

    Raises:
        DataError: The row is not a chat.
    """
    messages = read_messages(row, columns, at)
    return messages[:-1] if _is_blank_answer(messages[-1]) else messages


def _read_chat(row: RawRow, columns: Columns, renderer: ChatRenderer, at: str) -> _Chat:
    messages = read_turns(row, columns, at)
    if messages[-1]["role"] != "assistant":
        messages += read_answer(row, columns, at)
    tools = read_tools(row, columns, at)
    rendered = renderer.render(messages, tools, at)
    schemas = None if tools is None else tuple(tools)
    if not rendered.response:
        return _Chat(rendered, "", Chat(tuple(messages), schemas))
    spoken = rendered.response.removesuffix(rendered.end_of_turn).strip()
    source = Chat(tuple(messages[:-1]), schemas)
    return _Chat(rendered, messages[-1]["content"] or spoken, source)


def encode_spans(
    tokenizer: PreTrainedTokenizerBase, chats: Sequence[RenderedChat]
) -> Iterator[list[list[int]]]:
    """For each chat, the ids of its prompt spans and, last, of its response."""
    openings = encode_texts(tokenizer, [chat.prompt[0].text for chat in chats])
    later = [[*(span.text for span in chat.prompt[1:]), chat.response] for chat in chats]
    ids = iter(encode_continuations(tokenizer, [text for texts in later for text in texts]))
    for opening, texts in zip(openings, later, strict=True):
        yield [opening, *(next(ids) for _ in texts)]


def _example(
    index: int, chat: _Chat, ids: list[list[int]], eos_id: int, *, keeps_chat: bool
) -> Example:
    rendered = chat.rendered
    prompt_ids: list[int] = []
    prompt_mask: list[bool] = []
    for span, span_ids in zip(rendered.prompt, ids[:-1], strict=True):
        prompt_ids += span_ids
        prompt_mask += [span.is_assistant] * len(span_ids)
    needs_eos = bool(rendered.response) and not rendered.end_of_turn
    return Example(
        index=index,
        prompt_ids=tuple(prompt_ids),
        prompt_mask=tuple(prompt_mask),
        response_ids=(*ids[-1], eos_id) if needs_eos else tuple(ids[-1]),
        prompt="".join(span.text for span in rendered.prompt),
        response=chat.response,
        chat=chat.source if keeps_chat else None,
    )


def examples_from_chats(
    rows: Sequence[RawRow],
    tokenizer: PreTrainedTokenizerBase,
    *,
    eos_id: int,
    columns: Columns,
    where: str,
) -> list[Example]:
    """One example a row, of any length; a blank last turn becomes no response.

    The last assistant turn is the response, closed by the template's end-of-turn token or, where
    it writes none, by ``eos_id``. Earlier assistant turns are prompt tokens that carry loss. A chat
    that ends with another role is answered by the response column; without one it has no response,
    and its prompt ends with the generation prompt.

    Raises:
        DataError: The tokenizer has no chat template, the template is not prefix-stable, or a row
            is not a chat.
    """
    settings = columns.chat_template_kwargs
    renderer = ChatRenderer(tokenizer, eos_id=eos_id, where=where, settings=settings)
    chats = [
        _read_chat(row, columns, renderer, f"{where}, row {number}")
        for number, row in enumerate(rows, start=1)
    ]
    encoded = zip(chats, encode_spans(tokenizer, [chat.rendered for chat in chats]), strict=True)
    keeps_chat = bool(columns.declared_tools)  # rollouts go on with it
    return [
        _example(index, chat, ids, eos_id, keeps_chat=keeps_chat)
        for index, (chat, ids) in enumerate(encoded)
    ]
