"""How Lightning's messages reach people: beside a progress bar, and not at all in between runs."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

_LOGGERS = ("lightning.pytorch", "lightning.fabric")


class _CurrentStderr(logging.StreamHandler[TextIO]):
    """Writes to what ``sys.stderr`` is at that moment, such as a bar that makes room."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        """Wherever standard error goes now."""
        return sys.stderr


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
