"""How messages reach people: Lightning's beside a progress bar, and text of data on a terminal."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import transformers
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from okd_lightning.errors import one_line, printable

_EXPECTED_WARNINGS = (
    r"Found \d+ module\(s\) in eval mode",  # the teacher: it stays in eval mode on purpose
    r".*isinstance\(treespec, LeafSpec\).*",  # Lightning's own use of torch's pytree
    r".*does not have many workers.*",  # rollouts and tokenized rows need no worker processes
    r"Checkpoint directory .* exists and is not empty",  # a resumed run's own
    r".*`ModelCheckpoint\(monitor=.*could not find the monitored key.*",  # before any validation
    r".*`loftq_config` specified but will be ignored.*",  # PEFT's own default, spelt out
    r".*`is_gradient_checkpointing` is deprecated.*",  # PEFT's use of transformers
    r"(?s).*JsonargparseDeprecationWarning",  # Lightning's use of jsonargparse ...
    r"(?s).*instantiate_classes.*deprecated",  # ... in instantiate_classes
    r"(?s).*skip_none parameter was deprecated",  # ours, for versions that know no skip_unset
)

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
    """Have no message of Lightning's loggers, which are ours too, steer the terminal.

    Nor any of transformers', which quote what they find in a model's settings.
    """
    for name in ("lightning", *_LOGGERS, "transformers"):
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


def quiet_libraries() -> None:
    """Switch off what the libraries print that a user of ours can do nothing about."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "litlogger" not in record.getMessage()
    )
    for message in _EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    keep_messages_printable()
    warnings.formatwarning = _format_warning


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: Any = None
) -> str:
    """Our own warnings without the place in our source that gave them."""
    if Path(__file__).parents[1] in Path(filename).parents:
        return f"okd-lightning: warning: {one_line(str(message))}\n"
    text = printable(str(message), keep="\n")
    return f"{filename}:{lineno}: {category.__name__}: {text}\n"
