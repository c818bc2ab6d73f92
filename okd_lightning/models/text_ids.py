"""Text to token ids: prompts, continuations and the ends of responses.

Text rows, chats, teacher prompts, tool results and the evaluation of exports all tokenize here. The
rules:

* Prompt ids depend on the prompt alone: one opening id (bos) if the tokenizer or the text has one,
  and no closing id that the tokenizer adds.
* Continuation ids are the rest of the tokenizer's ids of context + text, so that both together are
  the ids of the whole text. Where a token of the whole text crosses the boundary, the continuation
  is tokenized separately, without what the tokenizer adds to or strips from the start of a text.
* A response has one end: the first end-of-sequence id among its final special tokens and blanks.
  Ends are recognised by their ids.
* The text of a special token inside a prompt or response becomes that token.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer
from tokenizers.normalizers import Normalizer
from tokenizers.pre_tokenizers import PreTokenizer
from transformers import BatchEncoding, PreTrainedTokenizerBase

from okd_lightning.errors import DataError

RULES_VERSION = 2
"""Version of the rules, changed whenever the ids of a row may change; kept by runs and caches."""

_TEXTS_PER_CALL = 1024
_CHARACTERS_PER_CALL = 1_000_000
"""A fast tokenizer needs about 150 bytes per character for offsets and masks of a call."""

MARGIN = 64
"""Tokens beyond a limit that are tokenized too, because cutting a text changes ids at its end."""

_Encode = Callable[[Sequence[int], Sequence[str]], list[list[int]]]


class TextEncoder:
    """Encode texts with one tokenizer; never pads, never warns about long texts.

    ``limit`` is the number of ids that a caller keeps. A text that is certain to have more is cut
    before it is tokenized: its first ``limit`` ids are unchanged, and more than these are returned.

    Args:
        tokenizer: A fast tokenizer is exact at every boundary. A slow one is used unchanged where a
            token crosses the boundary of two texts.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._closing: dict[int, bool] = {}

    def plain(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of separate texts, without the special tokens that the tokenizer adds.

        Raises:
            DataError: The tokenizer has neither a token nor an unknown token for a character.
        """
        return [ids for batch in _batches(texts) for ids in self._call(batch)["input_ids"]]

    def prompts(
        self, texts: Sequence[str], *, is_rendered: bool = False, limit: int | None = None
    ) -> list[list[int]]:
        """Return the ids of prompts.

        Args:
            texts: Prompts.
            is_rendered: True if a chat template has already added all special tokens; the tokenizer
                then adds none.
            limit: Ids of a prompt that are kept.

        Returns:
            For each text one opening id, then its own ids, without closing ids that the tokenizer
            adds.

        Raises:
            DataError: See ``plain``.
        """

        def encode(_: Sequence[int], cut: Sequence[str]) -> list[list[int]]:
            found: list[list[int]] = []
            for batch in _batches(cut):
                encoded = self._call(batch, adds_special_tokens=not is_rendered)
                masks = encoded["special_tokens_mask"]  # 1 on ids that the tokenizer has added
                found += map(self._opened, encoded["input_ids"], masks)
            return found

        return self._within(limit, texts, encode)

    def continuations(
        self, contexts: Sequence[str], texts: Sequence[str], *, limit: int | None = None
    ) -> list[list[int]]:
        """Return the ids of texts that follow other texts.

        Args:
            contexts: The text before each text.
            texts: The continuations.
            limit: Ids of a continuation that are kept.

        Raises:
            DataError: See ``plain``.
        """
        room = self._room(limit)
        contexts = contexts if room is None else [context[-room:] for context in contexts]

        def encode(rows: Sequence[int], cut: Sequence[str]) -> list[list[int]]:
            return self._rests([contexts[row] for row in rows], cut)

        return self._within(limit, texts, encode)

    def middles(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of separate texts, without the normalisation of a text's start.

        Raises:
            DataError: See ``plain``.
        """
        if self._inner is None or not texts:
            return self.plain(texts)
        found: list[list[int]] = []
        for batch in _batches(texts):
            with _encoding(batch):
                encoded = self._inner.encode_batch_fast(batch, add_special_tokens=False)
            found += [encoding.ids for encoding in encoded]
        return found

    def end_of(
        self, ids: Sequence[int], eos_ids: Collection[int], *, any_special: bool = False
    ) -> int | None:
        """Count the ids of a response up to and with its end; None if it has no end.

        Args:
            ids: A response that may close with special tokens and blanks.
            eos_ids: Ids that end a response.
            any_special: Whether the last special token is the end if there is no eos.
        """
        start = len(ids)
        while start and (ids[start - 1] in eos_ids or self._closes(ids[start - 1])):
            start -= 1
        closing = ids[start:]
        ends = [token for token in closing if token in eos_ids]
        if not ends and any_special:
            ends = [token for token in closing if token in self._special_ids][-1:]
        return start + closing.index(ends[0]) + 1 if ends else None

    def text_of(self, token: int) -> str:
        """Return the text of one token."""
        added = self.tokenizer.added_tokens_decoder.get(token)
        return str(self.tokenizer.decode([token])) if added is None else added.content

    # ---------------------------------------------------------------- calls of the tokenizer

    def _call(self, texts: list[str], *, adds_special_tokens: bool = False) -> BatchEncoding:
        with _encoding(texts):
            return self.tokenizer(
                texts,
                add_special_tokens=adds_special_tokens,
                padding=False,
                truncation=False,
                return_attention_mask=False,
                return_special_tokens_mask=True,
                verbose=False,  # no warning about model_max_length: our limits apply later
            )

    def _opened(self, ids: list[int], is_added: list[int]) -> list[int]:
        """Return the ids without added closing ids, and with one opening id at most."""
        own = [place for place, added in enumerate(is_added) if not added]
        bos = [self.tokenizer.bos_token_id]
        if own:
            opening, rest = ids[: own[0]], ids[own[0] : own[-1] + 1]
        else:
            opening, rest = ids[: ids[:1] == bos], []
        if not opening and rest[:1] == bos:
            opening, rest = rest[:1], rest[1:]
        while opening and rest[: len(opening)] == opening:
            rest = rest[len(opening) :]
        return opening + rest

    def _rests(self, contexts: Sequence[str], texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of context + text without those of the context."""
        try:
            before = self.plain(contexts)
            whole = self.plain([a + b for a, b in zip(contexts, texts, strict=True)])
        except DataError:
            if len(texts) == 1:  # the concatenation cannot be encoded, only the parts can
                return self.middles(texts)
            pairs = zip(contexts, texts, strict=True)
            return [self._rests([context], [text])[0] for context, text in pairs]
        found = [
            ids[len(first) :] if ids[: len(first)] == first else None
            for first, ids in zip(before, whole, strict=True)
        ]
        over = [text for text, ids in zip(texts, found, strict=True) if ids is None]
        middles = iter(self.middles(over))
        return [next(middles) if ids is None else ids for ids in found]

    @cached_property
    def _inner(self) -> Tokenizer | None:
        """The fast tokenizer without normalisation of a text's start; None for a slow one."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            return None
        own = {name: _read(getattr(backend, name)) for name in ("normalizer", "pre_tokenizer")}
        changed = {name: _without_start(part) for name, part in own.items()}
        if changed == own and backend.truncation is None and backend.padding is None:
            return backend  # a copy of a large vocabulary takes seconds
        parts = {**json.loads(backend.to_str()), **changed}
        parts.update(truncation=None, padding=None, post_processor=None)
        inner = Tokenizer.from_str(json.dumps(parts))
        inner.encode_special_tokens = backend.encode_special_tokens
        return inner

    # ---------------------------------------------------------------- long texts

    def _room(self, limit: int | None) -> int | None:
        """Return a number of characters that always gives more than ``limit`` ids."""
        return None if limit is None else (limit + MARGIN) * self._longest_token

    @cached_property
    def _longest_token(self) -> int:
        """Characters of the longest token; of a byte-level token, its bytes."""
        return max(map(len, self.tokenizer.get_vocab()))

    def _within(self, limit: int | None, texts: Sequence[str], encode: _Encode) -> list[list[int]]:
        """Encode as much of each text as determines its first ``limit`` ids.

        If that gives too few ids (normalisation or unknown tokens can use more characters than any
        token has), longer parts are encoded, in the end the whole text.
        """
        room = self._room(limit)
        rows: Sequence[int] = range(len(texts))
        found: list[list[int]] = [[] for _ in texts]
        while rows:
            cut = [texts[row][:room] for row in rows]
            for row, ids in zip(rows, encode(rows, cut), strict=True):
                found[row] = ids
            if limit is None or room is None:
                break
            rows = [r for r in rows if len(texts[r]) > room and len(found[r]) < limit + MARGIN]
            room *= 8
        return found

    # ---------------------------------------------------------------- special tokens and blanks

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        """Ids of special tokens, without the one for unknown text, which is content."""
        added = self.tokenizer.added_tokens_decoder.items()
        found = {*self.tokenizer.all_special_ids, *(i for i, token in added if token.special)}
        return frozenset(found - {self.tokenizer.unk_token_id})

    def _closes(self, token: int) -> bool:
        """Return whether a token may follow the end of a response: special, or blank."""
        if token not in self._closing:
            is_blank = not str(self.tokenizer.decode([token])).strip()
            self._closing[token] = is_blank or token in self._special_ids
        return self._closing[token]


@contextmanager
def _encoding(texts: Sequence[str]) -> Iterator[None]:
    """Convert the plain Exception of the tokenizers library into a DataError."""
    try:
        yield
    except Exception as error:
        if type(error) is not Exception:
            raise
        raise DataError(
            f"the tokenizer cannot encode all of {len(texts)} texts, such as {texts[0][:40]!r} "
            f"({error}); use a tokenizer with an unknown token, or leave such rows out"
        ) from error


def _batches(texts: Sequence[str]) -> Iterator[list[str]]:
    """Yield consecutive texts, as many as fit in one call."""
    batch: list[str] = []
    size = 0
    for text in texts:
        if batch and (len(batch) == _TEXTS_PER_CALL or size + len(text) > _CHARACTERS_PER_CALL):
            yield batch
            batch, size = [], 0
        batch.append(text)
        size += len(text)
    if batch:
        yield batch


def _read(part: Normalizer | PreTokenizer | None) -> Any:
    """Return a normalizer or pre-tokenizer in its tokenizer.json form."""
    return None if part is None else json.loads(part.__getstate__())


def _without_start(part: Any) -> Any:
    """Return a serialized normalizer or pre-tokenizer without its treatment of a text's start."""
    match part:
        case {"type": "Sequence"}:
            name = "normalizers" if "normalizers" in part else "pretokenizers"
            steps = [_without_start(step) for step in part[name]]
            return {**part, name: [step for step in steps if step is not None]}
        case {"type": "Prepend"}:
            return None
        case {"type": "Strip"}:
            return {**part, "strip_left": False}
        case {"type": "Metaspace"}:
            return {**part, "prepend_scheme": "never"}
        case {"type": "ByteLevel", "add_prefix_space": True}:
            return {**part, "add_prefix_space": False}
        case _:
            return part
