"""The ids of rendered chats: an opening, then assistant turns and what stands between them.

A turn's ids continue those of the text before it, so that no token reaches over the edge of a turn:
masks are exact, and what a rollout continues ends where the generation prompt ends.
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
        ids: Its own, with the one that ends it where the template writes one.
        end_id: The id that ends it; None where its text just stops.
        text: Its text without what ends it.
        after_ids: What the template writes from the end of the turn on.
    """

    ids: list[int]
    end_id: int | None
    text: str
    after_ids: list[int]


@dataclass(frozen=True)
class ChatIds:
    """The ids of a rendered chat, see ``RenderedChat``."""

    opening: list[int]
    turns: tuple[TurnIds, ...]


@dataclass(frozen=True)
class _Split:
    """A turn's text: its own part, the token that ends it, and what stands after that."""

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

    A turn ends at the first eos among the special tokens and blanks that close it, else at the last
    special token; without any, where the message's own text ends.

    Args:
        encoder: With the run's tokenizer.
        chats: The chats.
        eos_ids: Ids that end a response.
        limit: Ids of an opening, of a turn, or of what follows one, that are kept.
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
    """Tokenize turns, each with the text that stands before it; see ``encode_chats``."""
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
    """Cut a turn's text at the token that ends its ids: the last but as many as come after it."""
    end = encoder.text_of(ids[length - 1])
    stop = len(turn.text)
    for _ in range(1 + ids[length:].count(ids[length - 1])):
        stop = turn.text.rfind(end, 0, stop)
        if stop < 0:  # the tokenizer's normalisation made the token of another text
            return _Split(turn.text, end, "")
    return _Split(turn.text[:stop], end, turn.text[stop + len(end) :])


def _split_behind_text(turn: Turn) -> _Split:
    """Cut a turn that nothing ends where its message ends, else before the last blanks."""
    start = turn.text.rfind(turn.content)
    length = start + len(turn.content) if start >= 0 else 0
    if turn.text[length:].strip():
        length = len(turn.text.rstrip())
    return _Split(turn.text[:length], "", turn.text[length:])
