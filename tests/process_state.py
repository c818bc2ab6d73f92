"""Restoration of state that commands change: module path, seeds, warnings, log filters."""

from __future__ import annotations

import logging
import random
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import transformers


@contextmanager
def unchanged_process() -> Iterator[None]:
    """The command line may extend the module path and seed; other tests must not notice."""
    path = list(sys.path)
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    filters = list(logger.filters)
    loggers = [logging.getLogger(n) for n in ("lightning", "lightning.pytorch", "lightning.fabric")]
    handlers = [list(each.handlers) for each in loggers]
    for each in loggers:  # as at the start of a process: a progress bar has them follow sys.stderr
        each.handlers[:] = [logging.StreamHandler(sys.__stderr__) for _ in each.handlers]
    format_warning = warnings.formatwarning
    verbosity = transformers.utils.logging.get_verbosity()
    interrupt = signal.getsignal(signal.SIGINT)
    random_state = random.getstate()
    with warnings.catch_warnings(), torch.random.fork_rng():
        yield
    sys.path[:] = path
    random.setstate(random_state)
    logger.filters[:] = filters
    for each, before in zip(loggers, handlers, strict=True):
        each.handlers[:] = before
    warnings.formatwarning = format_warning
    transformers.utils.logging.set_verbosity(verbosity)
    transformers.utils.logging.enable_progress_bar()
    signal.signal(signal.SIGINT, interrupt)
