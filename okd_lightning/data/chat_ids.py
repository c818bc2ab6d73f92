"""The ids of rendered chats: an opening, then assistant turns and the text between them.

A turn's ids continue those of the text before it, and no token crosses the boundary of a turn:
masks are exact, and the prompt of a rollout ends with the generation prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from okd_lightning.data.templates import RenderedChat, Turn
from okd_lightning.models.text_ids import TextEncoder


@dataclass(frozen=True)
class TurnIds:
    """The ids of an assistant turn.

    Attributes:
        ids: Its ids, with its end id if the template has one.
        end_id: The id that ends it; None if there is none.
        text: Its text without the end.
        after_ids: Ids of the template's text from the end of the turn on.
    """

    ids: list[int]
    end_id: int | None
    text: str
    after_ids: list[int]


@dataclass(frozen=True)
class ChatIds:
    """The ids of a rendered chat; see ``RenderedChat``."""

    opening: list[int]
    turns: tuple[TurnIds, ...]


@dataclass(frozen=True)
class _Split:
    """A turn's text in three parts: its own text, the token that ends it, and the rest."""

    own: str
    end: str
    rest: str


def encode_chats(
    encoder: TextEncoder,
    chats: Sequence[RenderedChat],
    eos_ids: Sequence[int],
    *,
    limit: int | None = None,
) -> list[ChatIds]:
    """Tokenize rendered chats.

    A turn ends at the first eos among its final special tokens and blanks, else at the last special
    token; without any, at the end of the message's text.

    Args:
        encoder: Encoder of the run's tokenizer.
        chats: The chats.
        eos_ids: Ids that end a response.
        limit: Ids that are kept of an opening, of a turn, and of the text after it.
    """
    openings = encoder.prompts([chat.opening for chat in chats], is_rendered=True, limit=limit)
    contexts = [
        before
        for chat in chats
        for before in [chat.opening, *(turn.text + turn.after for turn in chat.turns)][:-1]
    ]
    turns = [turn for chat in chats for turn in chat.turns]
    found = iter(encode_turns(encoder, contexts, turns, eos_ids, limit=limit))
    return [
        ChatIds(opening, tuple(next(found) for _ in chat.turns))
        for opening, chat in zip(openings, chats, strict=True)
    ]


def encode_turns(
    encoder: TextEncoder,
    contexts: Sequence[str],
    turns: Sequence[Turn],
    eos_ids: Sequence[int],
    *,
    limit: int | None = None,
) -> list[TurnIds]:
    """Tokenize turns, each with the text before it; see ``encode_chats``."""
    closed = encoder.continuations(contexts, [turn.text for turn in turns], limit=limit)
    lengths = [encoder.end_of(ids, eos_ids, any_special=True) for ids in closed]
    splits = [
        _split_behind_text(turn) if length is None else _split(encoder, turn, ids, length)
        for turn, ids, length in zip(turns, closed, lengths, strict=True)
    ]
    own = iter(
        encoder.continuations(
            [c for c, length in zip(contexts, lengths, strict=True) if length is None],
            [split.own for split in splits if not split.end],
            limit=limit,
        )
    )
    after = encoder.continuations(
        [split.end or split.own for split in splits],
        [split.rest + turn.after for split, turn in zip(splits, turns, strict=True)],
        limit=limit,
    )
    return [
        TurnIds(
            ids=next(own) if length is None else ids[:length],
            end_id=None if length is None else ids[length - 1],
            text=split.own,
            after_ids=after_ids,
        )
        for ids, length, split, after_ids in zip(closed, lengths, splits, after, strict=True)
    ]


def _split(encoder: TextEncoder, turn: Turn, ids: list[int], length: int) -> _Split:
    """Divide a turn's text at the token that ends its ids; equal tokens may follow the end."""
    end = encoder.text_of(ids[length - 1])
    stop = len(turn.text)
    for _ in range(1 + ids[length:].count(ids[length - 1])):
        stop = turn.text.rfind(end, 0, stop)
        if stop < 0:  # the tokenizer's normalisation changed the token's text
            return _Split(turn.text, end, "")
    return _Split(turn.text[:stop], end, turn.text[stop + len(end) :])


def _split_behind_text(turn: Turn) -> _Split:
    """Divide a turn without an end at the end of its message, else before the final blanks."""
    start = turn.text.rfind(turn.content)
    length = start + len(turn.content) if start >= 0 else 0
    if turn.text[length:].strip():
        length = len(turn.text.rstrip())
    return _Split(turn.text[:length], "", turn.text[length:])
