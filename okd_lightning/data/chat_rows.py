"""Rows of chat messages to examples: rendered by the template, loss on the assistant's tokens only.

Templates that render the last answer differently make only its start and end known, not those of
earlier answers: such chats have loss on their last turn only, or give a prompt only.
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
from okd_lightning.data.images import RowImages, num_places
from okd_lightning.data.template_gaps import contents_left_out
from okd_lightning.data.templates import ChatRenderer, RenderedChat, not_prefix_stable
from okd_lightning.models.text_ids import TextEncoder
from okd_lightning.records import Chat, Example
from okd_lightning.records.images import ImageRef

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
        turns: The messages.
        tools: Tools passed to the template.
        rendered: The text.
        shortfall: Message about turns that cannot be learned, with a field for the chats; "" for
            none.
    """

    turns: ChatTurns
    tools: list[Any] | None
    rendered: RenderedChat
    shortfall: str = ""


def _read_chat(
    row: RawRow, columns: Columns, renderer: ChatRenderer, at: str, *, needs_response: bool
) -> _Chat:
    """Render a row, with as many of its learned turns located as the template allows."""
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


def _example(
    index: int, chat: _Chat, found: ChatIds, eos_id: int, images: tuple[ImageRef, ...]
) -> Example:
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
    elif chat.turns.is_answered:  # a reference for metrics, without loss
        response = chat.turns.messages[-1]["content"]
    schemas = None if chat.tools is None else tuple(chat.tools)
    return Example(
        index=index,
        prompt_ids=tuple(chain.from_iterable(ids for ids, _ in spans)),
        prompt_mask=tuple(learned for ids, learned in spans for _ in ids),
        response_ids=tuple(response_ids),
        prompt=chat.rendered.prompt,
        response=response,
        chat=Chat(chat.turns.asked, schemas),
        images=images,
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
    images: RowImages | None = None,
) -> tuple[list[Example], tuple[str, ...]]:
    """Return one example per row; a blank last turn becomes no response.

    The last assistant turn is the response, closed by the template's end-of-turn token or, without
    one, by the first of ``eos_ids``. Earlier assistant turns are prompt tokens that carry loss,
    unless the row switches it off. A chat that ends with another role is completed by the response
    column; without one it has no response, and its prompt ends with the generation prompt. Prompts
    and responses above their limits keep some tokens beyond them.

    ``eos_ids`` are the ids that end a response; the other arguments are those of
    ``examples.build_examples``.

    Returns:
        The examples, and a message for each kind of turn that cannot be learned because the
        template renders the last answer differently, and of content that it does not show.

    Raises:
        DataError: The tokenizer has no chat template, a row is not a chat, or one whose response is
            needed has a template that does not begin it with its generation prompt.
    """
    settings = columns.chat_template_kwargs
    renderer = ChatRenderer(
        encoder.tokenizer,
        where=where,
        settings=settings,
        images=None if images is None else images.are_present,
    )
    places = [f"{where}, row {number}" for number in range(1, len(rows) + 1)]
    chats = [
        _read_chat(row, columns, renderer, at, needs_response=needs_response)
        for row, at in zip(rows, places, strict=True)
    ]
    limit = max(max_prompt_length, max_response_length)
    rendered = [chat.rendered for chat in chats]
    own: list[tuple[ImageRef, ...]] = [()] * len(rows)
    if images is not None:
        own = [  # of the messages that are kept: those after the last learned turn are not
            images.of_row(row, columns, at)[: num_places(chat.turns.messages)]
            for row, chat, at in zip(rows, chats, places, strict=True)
        ]
        rendered = [
            images.chat(chat, refs, at)
            for chat, refs, at in zip(rendered, own, places, strict=True)
        ]
    found = encode_chats(encoder, rendered, eos_ids, limit=limit)
    examples = [
        _example(index, chat, ids, eos_ids[0], refs)
        for index, (chat, ids, refs) in enumerate(zip(chats, found, own, strict=True))
    ]
    shortfalls = Counter(chat.shortfall for chat in chats if chat.shortfall)
    notes = [text.format(f"{num:,} of {len(chats):,} chats") for text, num in shortfalls.items()]
    listed = not columns.declared_tools  # those are checked with the rollouts
    shown = [(chat.turns.messages, chat.tools if listed else None) for chat in chats]
    return examples, (*notes, *contents_left_out(shown, renderer, places))
