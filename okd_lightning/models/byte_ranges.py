"""Vocabulary sorted by bytes, in which all tokens with a given prefix are one range."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from okd_lightning.records.chunks import IntArray, Piece

_MOST_BOUNDS, _MOST_SPLITS = 2**17, 2**14
"""Most prefixes whose ranges are kept: some 30 MB each."""


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
        self._splits: dict[bytes, IntArray] = {}
        self._bounds: dict[bytes, IntArray] = {}

    @cached_property
    def alphabet(self) -> frozenset[int]:
        """Bytes that occur in a token."""
        return frozenset(byte for text in self._texts for byte in text)

    def bounds(self, prefix: bytes) -> IntArray:
        """Return the first place of ``order`` that begins with ``prefix``, and the one after."""
        if prefix not in self._bounds:
            after = prefix + b"\xff" * (self.longest + 1)  # longer than any token with the prefix
            low, high = bisect_left(self._texts, prefix), bisect_left(self._texts, after)
            if low == high:  # not kept: infinitely many texts are the prefix of no token
                return np.array([low, high])
            if len(self._bounds) == _MOST_BOUNDS:
                self._bounds.clear()
            self._bounds[prefix] = np.array([low, high])
        return self._bounds[prefix]

    def splits(self, prefix: bytes) -> IntArray:
        """Return 258 places: those of ``bounds``, and between them the first with each next byte.

        Between places 1 + b and 2 + b are the tokens that begin with ``prefix`` and byte b; before
        place 1 those that are the prefix.
        """
        if prefix not in self._splits:
            low, high = map(int, self.bounds(prefix))
            if low == high:
                return np.full(258, low)
            firsts = [bisect_left(self._texts, prefix + bytes([b]), low, high) for b in range(256)]
            if len(self._splits) == _MOST_SPLITS:
                self._splits.clear()
            self._splits[prefix] = np.array([low, *firsts, high])
        return self._splits[prefix]
