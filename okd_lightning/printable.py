"""Text from data, models and servers as it may be written to a terminal: one function.

Terminals act on control characters: escape sequences move the cursor, recolour or rename the
window, a carriage return overwrites the line, bidirectional controls reorder what is read. Owns
which characters are replaced; who prints decides when.
"""

from __future__ import annotations

import unicodedata

_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Controls, format characters (bidi, zero width), surrogates, line and paragraph separators."""

_KEPT = frozenset("\u200c\u200d\u00ad")
"""Joiners, which scripts and emoji need, and the soft hyphen."""


def printable(text: str, keep: str = "") -> str:
    r"""Replace each character that is not visible by its escape, such as ``\x1b`` or ``\u202e``.

    Args:
        text: Any.
        keep: Characters that stay, such as a newline.
    """
    if text.isprintable():
        return text
    return "".join(
        escaped(character) if _is_hidden(character) and character not in keep else character
        for character in text
    )


def escaped(character: str) -> str:
    """A character as Python writes it in a string."""
    return character.encode("unicode_escape").decode("ascii")


def one_line(text: str, longest: int = 4000) -> str:
    """Text on one line: white space becomes one blank, what is not visible is escaped.

    Args:
        text: Any.
        longest: Characters after which it is cut, with three dots.
    """
    line = printable(" ".join(text.split()))
    return line if len(line) <= longest else line[:longest] + "..."


def _is_hidden(character: str) -> bool:
    return unicodedata.category(character) in _CATEGORIES and character not in _KEPT
