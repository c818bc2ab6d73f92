"""How messages reach people: Lightning's beside a progress bar, and text of data on a terminal."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from okd_lightning.printable import printable

_LOGGERS = ("lightning.pytorch", "lightning.fabric")


class PrintableConsole(Console):
    """A console on which nothing that is printed can steer the terminal, and no text is markup.

    What is styled is a ``rich.text.Text``: in a string, [/INST] and [bold] are what they are. What
    rich itself makes (colours, cursor moves) is in a segment's style and control codes; its
    text is what was given.

    Args:
        settings: Of rich's Console.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{**settings, "markup": False, "emoji": False})

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """The segments of ``renderable``, their text as ``printable`` leaves it."""
        for segment in super().render(renderable, options):
            text = segment.text
            is_plain = segment.control is not None or text.isprintable()
            yield segment if is_plain else segment._replace(text=printable(text, keep="\n"))


class _CurrentStderr(logging.StreamHandler[TextIO]):
    """Writes to what ``sys.stderr`` is at that moment, such as a bar that makes room."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        """Wherever standard error goes now."""
        return sys.stderr


def _make_printable(record: logging.LogRecord) -> bool:
    """A filter that passes every message on, without what would steer the terminal."""
    record.msg, record.args = printable(record.getMessage(), keep="\n\t"), ()
    return True


def keep_messages_printable() -> None:
    """Have no message of Lightning's loggers, which are ours too, steer the terminal."""
    for name in ("lightning", *_LOGGERS):
        for handler in logging.getLogger(name).handlers:
            handler.addFilter(_make_printable)


def follow_stderr() -> None:
    """Have Lightning's messages go to ``sys.stderr`` as it is when they are written.

    Its handlers keep the stream of the time of import: what they write tears a progress bar apart,
    which puts a stream of its own in that place to write above itself.
    """
    for name in ("lightning", *_LOGGERS):
        logger = logging.getLogger(name)
        for handler in [h for h in logger.handlers if type(h) is logging.StreamHandler]:
            logger.removeHandler(handler)
            logger.addHandler(_CurrentStderr())
    keep_messages_printable()


@contextmanager
def only_warnings() -> Iterator[None]:
    """Within it Lightning's loggers pass on warnings and worse; behind it they are as before."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
