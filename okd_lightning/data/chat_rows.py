"""Rows of chat messages to examples: rendered by the template, loss on the assistant's tokens only.

Templates that treat the last answer apart leave its beginning and end known, not those of earlier
ones: such chats are learned from their last turn, or give a prompt only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from okd_lightning.data.chat_ids import ChatIds, encode_chats
from okd_lightning.data.chat_turns import ChatTurns, read_turns
from okd_lightning.data.columns import Columns, RawRow, read_tools
from okd_lightning.data.templates import ChatRenderer, RenderedChat, not_prefix_stable
from okd_lightning.models.text_ids import TextEncoder
from okd_lightning.records.batches import Chat, Example

_ONLY_LAST = (
    "the chat template renders assistant turns otherwise once more follows, so that in {} earlier "
    "ones carry no loss"
)
_ONLY_PROMPT = (
    "the chat template does not begin an answer with its generation prompt, so that {} are "
    "prompts without a response"
)


@dataclass(frozen=True)
class _Chat:
    """A rendered row.

    Attributes:
        turns: What it was rendered from.
        tools: What the template was told may be called.
        rendered: The text.
        shortfall: What of it cannot be learned, as a text with a place for the chats; "" for
            nothing.
    """

    turns: ChatTurns
    tools: list[Any] | None
    rendered: RenderedChat
    shortfall: str = ""


def _read_chat(
    row: RawRow, columns: Columns, renderer: ChatRenderer, at: str, *, needs_response: bool
) -> _Chat:
    """The row as text, with as many of its learned turns cut out as the template allows."""
    turns, tools = read_turns(row, columns, at), read_tools(row, columns, at)
    rendered = renderer.render(turns.messages, tools, at, turns.learned)
    if not rendered.unplaced:
        return _Chat(turns, tools, rendered)
    if not turns.is_answered:
        return _Chat(turns, tools, renderer.render(turns.messages, tools, at, ()), _ONLY_LAST)
    rendered = renderer.render(turns.messages, tools, at, turns.learned[-1:])
    if not rendered.unplaced:
        return _Chat(turns, tools, rendered, _ONLY_LAST)
    if needs_response:
        raise not_prefix_stable(turns.learned[-1], at)
    return _Chat(turns, tools, renderer.render(turns.asked, tools, at, ()), _ONLY_PROMPT)


def _example(index: int, chat: _Chat, found: ChatIds, eos_id: int, *, keeps_chat: bool) -> Example:
    is_answered = chat.rendered.is_answered
    earlier = found.turns[:-1] if is_answered else found.turns
    spans = [(found.opening, False)]
    for turn in earlier:
        spans += [(turn.ids, True), (turn.after_ids, False)]
    response_ids, response = list[int](), ""
    if is_answered:
        last = found.turns[-1]
        response_ids = [*last.ids, eos_id] if last.end_id is None else last.ids
        response = chat.turns.messages[-1]["content"] or last.text.strip()
    elif chat.turns.is_answered:  # a reference for measures, which nothing is learned from
        response = chat.turns.messages[-1]["content"]
    schemas = None if chat.tools is None else tuple(chat.tools)
    return Example(
        index=index,
        prompt_ids=tuple(chain.from_iterable(ids for ids, _ in spans)),
        prompt_mask=tuple(learned for ids, learned in spans for _ in ids),
        response_ids=tuple(response_ids),
        prompt=chat.rendered.prompt,
        response=response,
        chat=Chat(chat.turns.asked, schemas) if keeps_chat else None,
    )


def examples_from_chats(
    rows: Sequence[RawRow],
    encoder: TextEncoder,
    *,
    eos_ids: Sequence[int],
    columns: Columns,
    max_prompt_length: int,
    max_response_length: int,
    needs_response: bool,
    where: str,
) -> tuple[list[Example], tuple[str, ...]]:
    """One example a row; a blank last turn becomes no response.

    The last assistant turn is the response, closed by the template's end-of-turn token or, where
    it writes none, by the first of ``eos_ids``. Earlier assistant turns are prompt tokens that
    carry loss, unless the row switches it off. A chat that ends with another role is answered by
    the response column; without one it has no response, and its prompt ends with the generation
    prompt. Ids of prompts and responses that are longer than their limits go on for some tokens
    more.

    Returns:
        The examples, and what cannot be learned because the template treats the last answer apart,
        as one line a kind.

    Raises:
        DataError: The tokenizer has no chat template, a row is not a chat, or one whose response is
            needed has a template that does not begin it with its generation prompt.
    """
    settings = columns.chat_template_kwargs
    renderer = ChatRenderer(encoder.tokenizer, where=where, settings=settings)
    chats = [
        _read_chat(row, columns, renderer, f"{where}, row {number}", needs_response=needs_response)
        for number, row in enumerate(rows, start=1)
    ]
    limit = max(max_prompt_length, max_response_length)
    rendered = [chat.rendered for chat in chats]
    found = encode_chats(encoder, rendered, eos_ids, limit=limit)
    keeps_chat = bool(columns.declared_tools)  # rollouts go on with it
    examples = [
        _example(index, chat, ids, eos_ids[0], keeps_chat=keeps_chat)
        for index, (chat, ids) in enumerate(zip(chats, found, strict=True))
    ]
    shortfalls = Counter(chat.shortfall for chat in chats if chat.shortfall)
    notes = [text.format(f"{num:,} of {len(chats):,} chats") for text, num in shortfalls.items()]
    return examples, tuple(notes)
