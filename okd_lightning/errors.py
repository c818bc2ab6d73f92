"""The exception tree: every error that a user can cause has a class here.

Each class also inherits the standard-library class that it refines, so that ``except ValueError``
in a user's script keeps working. A message states the problem, the given value, the expected one,
the place and the remedy; the command line prints it as one line and exits with a non-zero status.

``printable`` and ``one_line`` make text of data, models and servers safe for a terminal, which acts
on control characters: escape sequences move the cursor, recolour or rename the window, a carriage
return overwrites the line, bidirectional controls reorder the text.
"""

from __future__ import annotations

import unicodedata

_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Controls, format characters (bidi, zero width), surrogates, line and paragraph separators."""

_KEPT = frozenset("\u200c\u200d\u00ad")
"""Joiners, which scripts and emoji need, and the soft hyphen."""


def printable(text: str, keep: str = "") -> str:
    r"""Replace each invisible character by its escape, such as ``\x1b`` or ``\u202e``.

    Args:
        text: Any text.
        keep: Characters that stay, such as a newline.
    """
    if text.isprintable():
        return text
    return "".join(
        escaped(character) if _is_hidden(character) and character not in keep else character
        for character in text
    )


def escaped(character: str) -> str:
    """Return a character as Python writes it in a string."""
    return character.encode("unicode_escape").decode("ascii")


def one_line(text: str, longest: int = 4000) -> str:
    """Return text on one line: white space becomes one blank, invisible characters are escaped.

    Args:
        text: Any text.
        longest: Most characters; a longer text is cut, with three dots.
    """
    line = printable(" ".join(text.split()))
    return line if len(line) <= longest else line[:longest] + "..."


def _is_hidden(character: str) -> bool:
    return unicodedata.category(character) in _CATEGORIES and character not in _KEPT


class OKDLightningError(Exception):
    """Base of all errors that this library raises on purpose.

    Its text is one line without control characters, whatever the message quotes from data.
    """

    def __str__(self) -> str:
        """Return the message, safe for a terminal."""
        return one_line(super().__str__())


class ConfigError(OKDLightningError, ValueError):
    """A setting, or a combination of settings, that cannot work."""


class UsageError(ConfigError):
    """A command line that cannot be parsed; exit status 2."""


class DataError(OKDLightningError, ValueError):
    """A dataset that is empty, broken, or lacks required columns."""


class DataNotFoundError(DataError, FileNotFoundError):
    """A data file or folder that does not exist."""


class ModelError(OKDLightningError, ValueError):
    """A model that cannot be loaded or used."""


class ModelNotFoundError(ModelError, FileNotFoundError):
    """A model folder or hub id that does not exist."""


class VocabularyError(ModelError):
    """Student and teacher whose tokenizers differ."""


class CheckpointError(OKDLightningError, RuntimeError):
    """A checkpoint that is missing, broken, or of another run."""


class RewardError(OKDLightningError, ValueError):
    """A reward function that raised, or returned something that is not one number per response."""


class OutputError(OKDLightningError, OSError):
    """A folder or file that cannot be written."""


class FolderInUseError(OutputError):
    """A folder that another process writes in at the same time."""


class NonFiniteError(OKDLightningError, FloatingPointError):
    """A loss, gradient or weight that is NaN or infinite.

    Raised before the optimizer's step, or before the weights are written.
    """


class CacheError(OKDLightningError, RuntimeError):
    """A cache on disk that is broken, or cannot be read by all processes of a run."""


class RolloutTimeoutError(OKDLightningError, TimeoutError):
    """An engine that did not reply in time while it generated responses; raised on all ranks."""


class WorkerError(OKDLightningError, RuntimeError):
    """The process that generates ahead of training has failed or ended; raised on all ranks."""


class LostRankError(OKDLightningError, ConnectionError):
    """Another process of a run on several devices has ended or does not answer."""


class DifferingRanksError(OKDLightningError, RuntimeError):
    """Processes of one run that have read other data, models, settings or libraries."""


class PreemptedError(OKDLightningError, InterruptedError):
    """A run that was asked to stop (SIGTERM), after a checkpoint; exit status 143."""


class ServerError(OKDLightningError, ConnectionError):
    """A server that cannot be reached, refuses, or does not fit this run."""


class ServerTimeoutError(ServerError, TimeoutError):
    """A server that did not reply in time."""
