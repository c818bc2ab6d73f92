"""A vocabulary sorted by bytes: the tokens that begin with some bytes are a range of it."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from functools import cached_property

from okd_lightning.records.chunks import Piece


class ByteRanges:
    """Ranges of a vocabulary's tokens by the bytes that they begin with.

    Args:
        pieces: Bytes by id; None for an id without text.

    Attributes:
        order: Ids with text, sorted by their bytes.
        longest: Bytes of the longest token.
    """

    def __init__(self, pieces: Sequence[Piece]) -> None:
        found = sorted((piece, i) for i, piece in enumerate(pieces) if piece)
        self.order = tuple(i for _, i in found)
        self._texts = [text for text, _ in found]
        self.longest = max(map(len, self._texts), default=0)
        self._known: dict[bytes, tuple[int, ...]] = {}

    @cached_property
    def alphabet(self) -> frozenset[int]:
        """Bytes that occur in a token."""
        return frozenset(byte for text in self._texts for byte in text)

    def bounds(self, prefix: bytes) -> tuple[int, int]:
        """Return the first place of ``order`` that begins with ``prefix``, and the one after."""
        after = prefix + b"\xff" * self.longest  # no shorter than any token with the prefix
        return bisect_left(self._texts, prefix), bisect_left(self._texts, after + b"\xff")

    def splits(self, prefix: bytes) -> tuple[int, ...]:
        """Return 258 places: those of ``bounds``, and between them the first with each next byte.

        Between places 1 + b and 2 + b are the tokens that begin with ``prefix`` and byte b; before
        place 1 those that are the prefix.
        """
        if prefix not in self._known:
            low, high = self.bounds(prefix)
            firsts = [bisect_left(self._texts, prefix + bytes([b]), low, high) for b in range(256)]
            self._known[prefix] = (low, *firsts, high)
        return self._known[prefix]
