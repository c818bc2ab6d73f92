"""Messages for users: Lightning's next to a progress bar, and untrusted text on a terminal."""

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
    r"Found \d+ module\(s\) in eval mode",  # the teacher stays in eval mode on purpose
    r".*isinstance\(treespec, LeafSpec\).*",  # Lightning's own use of torch's pytree
    r".*does not have many workers.*",  # rollouts and tokenized rows need no worker processes
    r".*Total length of `list` across ranks is zero.*",  # StepIntervals reports it
    r"Checkpoint directory .* exists and is not empty",  # a resumed run's own
    r".*`ModelCheckpoint\(monitor=.*could not find the monitored key.*",  # before any validation
    r".*`loftq_config` specified but will be ignored.*",  # PEFT's own default, spelt out
    r".*`is_gradient_checkpointing` is deprecated.*",  # PEFT's use of transformers
    r"(?s).*JsonargparseDeprecationWarning",  # Lightning's use of jsonargparse ...
    r"(?s).*instantiate_classes.*deprecated",  # ... in instantiate_classes
    r"(?s).*skip_none parameter was deprecated",  # ours, for versions without skip_unset
)

_BANNERS = (
    "GPU available: ",
    "TPU available: ",
    "HPU available: ",
    "Seed set to ",
    "\N{ELECTRIC LIGHT BULB} Tip",
)
"""Beginnings of log lines that a user cannot act on; the first lines of a run name its devices."""

_LOGGERS = ("lightning.pytorch", "lightning.fabric")


class PrintableConsole(Console):
    """A console on which printed text cannot control the terminal, and no text is markup.

    Styled text is a ``rich.text.Text``: in a string, [/INST] and [bold] stay as they are. Rich's
    own colours and cursor moves are in a segment's style and control codes; its text is the given
    text.

    Args:
        settings: Arguments of rich's Console.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{**settings, "markup": False, "emoji": False})

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Yield the segments of ``renderable``, with their text made ``printable``."""
        for segment in super().render(renderable, options):
            text = segment.text
            is_plain = segment.control is not None or text.isprintable()
            yield segment if is_plain else segment._replace(text=printable(text, keep="\n"))


class _CurrentStderr(logging.StreamHandler[TextIO]):
    """Log handler for the current ``sys.stderr``, such as a progress bar's."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        """The current standard error."""
        return sys.stderr


def _make_printable(record: logging.LogRecord) -> bool:
    """Make a record printable; as a logging filter, pass all records."""
    record.msg, record.args = printable(record.getMessage(), keep="\n\t"), ()
    return True


def keep_messages_printable() -> None:
    """Make messages of Lightning's loggers, which we use too, printable.

    Also those of transformers, which quote text of a model's settings.
    """
    for name in ("lightning", *_LOGGERS, "transformers"):
        for handler in logging.getLogger(name).handlers:
            handler.addFilter(_make_printable)


def follow_stderr() -> None:
    """Make Lightning's messages go to ``sys.stderr`` as it is when they are written.

    Its handlers keep the stream of the time of import. Their output would break a progress bar,
    which replaces ``sys.stderr`` to write above itself.
    """
    for name in ("lightning", *_LOGGERS):
        logger = logging.getLogger(name)
        for handler in [h for h in logger.handlers if type(h) is logging.StreamHandler]:
            logger.removeHandler(handler)
            logger.addHandler(_CurrentStderr())
    keep_messages_printable()


@contextmanager
def only_warnings() -> Iterator[None]:
    """Limit Lightning's loggers to warnings and errors within the context."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def quiet() -> None:
    """Disable output of libraries that a user cannot act on, as the command line does.

    For scripts and notebooks: no loading bars of transformers, no banners of Lightning, and none of
    the warnings that every distillation would cause (a teacher in eval mode, rollouts without
    worker processes). Warnings of this package are printed without their place in its source.
    """
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    for name in (
        "pytorch.utilities.rank_zero",
        "fabric.utilities.rank_zero",
        "fabric.utilities.seed",
    ):
        logging.getLogger(f"lightning.{name}").addFilter(_is_no_banner)
    for message in _EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    keep_messages_printable()
    warnings.formatwarning = _format_warning


def _is_no_banner(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_BANNERS)


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: Any = None
) -> str:
    """Format our own warnings without their place in our source."""
    if Path(__file__).parents[1] in Path(filename).parents:
        return f"okd-lightning: warning: {one_line(str(message))}\n"
    text = printable(str(message), keep="\n")
    return f"{filename}:{lineno}: {category.__name__}: {text}\n"
